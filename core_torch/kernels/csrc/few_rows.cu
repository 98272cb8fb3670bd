// TVM-FFI: few_rows(x, weight, out, launch_with_pdl)
//
// On TVM-FFI's current stream; nothing is allocated.

#include "few_rows.cuh"
#include "host.cuh"

namespace crossfuse::few_rows {

template <int kTiles>
void start(const Params& params, cudaStream_t stream, bool overlap) {
  // Each time: it holds for the current device only.
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(
      product<kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Content))));
  const unsigned blocks = static_cast<unsigned>((params.O + kTileRows - 1) / kTileRows);
  launch({dim3(blocks), dim3(kThreads), stream, overlap, 0, sizeof(Content)}, product<kTiles>, params);
}

void run(TensorView x, TensorView weight, TensorView out, bool launch_with_pdl) {
  check_dense(weight, "weight", {-1, -1});
  const int64_t O = weight.size(0), I = weight.size(1), T = x.ndim() == 2 ? x.size(0) : -1;
  check_rows(x, "x", {-1, I});
  check_dense(out, "out", {T, O});
  for (TensorView operand : {x, weight, out}) check_dtype(operand, "x, weight and out", kBFloat16);
  check_devices({x, weight, out});
  if (T > kMaxRows || I % 8 != 0 || x.stride(0) % 8 != 0) {
    TVM_FFI_THROW(ValueError) << "x must have at most " << kMaxRows
                              << " rows that begin at multiples of 16 bytes, and a multiple of 8 columns; got "
                              << T << " rows of " << I << " with a stride of " << x.stride(0);
  }
  if (T == 0 || O == 0) return;
  const Params params{data<bf16>(x), data<bf16>(weight),  data<bf16>(out),    x.stride(0),
                      static_cast<int>(T), static_cast<int>(O), static_cast<int>(I)};
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  auto begin = T <= kTileTokens ? start<1> : T <= 2 * kTileTokens ? start<2> : start<4>;
  begin(params, current_stream(x), launch_with_pdl);
}

}  // namespace crossfuse::few_rows

TVM_FFI_DLL_EXPORT_TYPED_FUNC(few_rows, crossfuse::few_rows::run);
