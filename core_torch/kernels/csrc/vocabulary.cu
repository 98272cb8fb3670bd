// TVM-FFI: vocabulary_rows(tokens, weight, out, first, count, launch_with_pdl)
//          vocabulary_argmax(logits, keys, first, launch_with_pdl)
//
// On TVM-FFI's current stream; nothing is allocated.

#include "host.cuh"
#include "vocabulary.cuh"

namespace crossfuse::vocabulary {

void run_rows(TensorView tokens, TensorView weight, TensorView out, int64_t first, int64_t count,
              bool launch_with_pdl) {
  check_dense(weight, "weight", {-1, -1});
  const int64_t D = weight.size(1), T = tokens.ndim() == 1 ? tokens.size(0) : -1;
  check_dense(out, "out", {T, D});
  check_index(tokens, "tokens");
  check_dtype(weight, "weight", kBFloat16);
  check_dtype(out, "out", kBFloat16);
  check_devices({tokens, weight, out});
  if (D % 8 != 0 || count < 0 || count > weight.size(0)) {
    TVM_FFI_THROW(ValueError) << "the hidden size must be a multiple of 8, and count at most weight's rows; "
                              << "got " << D << ", and " << count << " of " << weight.size(0);
  }
  if (T == 0 || D == 0) return;
  const Rows params{tokens.data_ptr(), is(tokens, kInt64), tokens.stride(0),    data<bf16>(weight),
                    data<bf16>(out),   first,              count,               static_cast<int>(D)};
  tvm::ffi::CUDADeviceGuard guard(weight.device().device_id);
  launch({dim3(static_cast<unsigned>(T)), dim3(kRowThreads), current_stream(weight), launch_with_pdl}, rows,
         params);
}

void run_argmax(TensorView logits, TensorView keys, int64_t first, bool launch_with_pdl) {
  check_rows(logits, "logits", {-1, -1});
  const int64_t T = logits.size(0), W = logits.size(1);
  check_dense(keys, "keys", {T});
  check_dtype(logits, "logits", kBFloat16);
  check_dtype(keys, "keys", kInt64);
  check_devices({logits, keys});
  if (W < 1 || first < 0 || first + W > kLowHalf) {
    TVM_FFI_THROW(ValueError) << "logits must be of 1 to 2^31 entries of the vocabulary, got " << W
                              << " from number " << first;
  }
  if (T == 0) return;
  const Argmax params{data<bf16>(logits), logits.stride(0), data<int64_t>(keys), static_cast<int>(W),
                      static_cast<int32_t>(first)};
  tvm::ffi::CUDADeviceGuard guard(logits.device().device_id);
  launch({dim3(static_cast<unsigned>(T)), dim3(kArgmaxThreads), current_stream(logits), launch_with_pdl},
         argmax, params);
}

}  // namespace crossfuse::vocabulary

TVM_FFI_DLL_EXPORT_TYPED_FUNC(vocabulary_rows, crossfuse::vocabulary::run_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(vocabulary_argmax, crossfuse::vocabulary::run_argmax);
