// TVM-FFI: add_norm(summed, residual, weight, out_residual, out_normed, eps, weight_bias, launch_with_pdl)
//
// residual and out_residual may both be None. On TVM-FFI's current stream; nothing is allocated.

#include "add_norm.cuh"
#include "host.cuh"

namespace crossfuse::add_norm {

using Some = tvm::ffi::Optional<TensorView>;

void run(TensorView summed, Some residual, TensorView weight, Some out_residual, TensorView out_normed,
         double eps, double weight_bias, bool launch_with_pdl) {
  check_dense(summed, "summed", {-1, -1});
  const int64_t T = summed.size(0), D = summed.size(1);
  check_dense(weight, "weight", {D});
  check_dense(out_normed, "out_normed", {T, D});
  for (TensorView x : {summed, weight, out_normed})
    check_dtype(x, "summed, weight and out_normed", kBFloat16);
  check_devices({summed, weight, out_normed});
  if (residual.has_value() != out_residual.has_value()) {
    TVM_FFI_THROW(ValueError) << "residual and out_residual come together or not at all";
  }
  if (residual.has_value()) {
    for (TensorView x : {residual.value(), out_residual.value()}) {
      check_dense(x, "residual and out_residual", {T, D});
      check_dtype(x, "residual and out_residual", kBFloat16);
      check_devices({summed, x});
    }
  }
  if (D % 8 != 0 || D > kMaxDim) {
    TVM_FFI_THROW(ValueError) << "the hidden size must be a multiple of 8 up to " << kMaxDim << ", got " << D;
  }
  if (T == 0 || D == 0) return;

  const Params params{data<bf16>(summed),
                      residual.has_value() ? data<bf16>(residual.value()) : nullptr,
                      data<bf16>(weight),
                      out_residual.has_value() ? data<bf16>(out_residual.value()) : nullptr,
                      data<bf16>(out_normed),
                      static_cast<int>(D),
                      static_cast<float>(eps),
                      static_cast<float>(weight_bias)};
  tvm::ffi::CUDADeviceGuard guard(summed.device().device_id);
  const unsigned warps = static_cast<unsigned>((D / 8 + kWarp - 1) / kWarp);
  launch({dim3(static_cast<unsigned>(T)), dim3(warps * kWarp), current_stream(summed), launch_with_pdl}, norm,
         params);
}

}  // namespace crossfuse::add_norm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_norm, crossfuse::add_norm::run);
