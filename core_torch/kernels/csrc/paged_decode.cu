// TVM-FFI: paged_decode(q, k, v, tables, lengths, values, sums, out, gate, scale, launch_with_pdl)
//          paged_decode_ahead(the same, first, second), two tensors or None to be fetched into the L2 cache
//
// values float32 [B, G, S, 8, d] and sums float32 [B, G, S, 8, 2] are scratch, with S = min(64, the 64-token
// blocks of a table's pages). On TVM-FFI's current stream; nothing is allocated.

#include "host.cuh"
#include "paged_decode.cuh"

namespace crossfuse::paged {

template <int kDim>
void start(const Params& params, int64_t most_items, int multiprocessors, cudaStream_t stream, bool overlap) {
  using Memory = Shared<kDim>;
  // Each time: it holds for the current device only.
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(attend<kDim>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(sizeof(Memory))));
  const int64_t blocks = std::min<int64_t>(most_items, Memory::resident() * multiprocessors);
  launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, overlap, 0, sizeof(Memory)},
         attend<kDim>, params);
  launch(
      {dim3(static_cast<unsigned>(params.H), static_cast<unsigned>(params.B)), dim3(kDim), stream, overlap},
      combine<kDim>, params);
}

using Some = tvm::ffi::Optional<TensorView>;

void run_ahead(TensorView q, TensorView k, TensorView v, TensorView tables, TensorView lengths,
               TensorView values, TensorView sums, TensorView out, Some gate, double scale,
               bool launch_with_pdl, Some first_ahead, Some second_ahead) {
  check_rows(q, "q", {-1, -1, -1});
  const int64_t B = q.size(0), H = q.size(1), d = q.size(2);
  check_dense(k, "k", {-1, -1, -1, d});
  const int64_t page_size = k.size(1), G = k.size(2);
  check_dense(v, "v", {k.size(0), page_size, G, d});
  if (tables.ndim() != 2 || tables.size(0) != B || lengths.ndim() != 1 || lengths.size(0) != B) {
    TVM_FFI_THROW(ValueError) << "tables must be [B, P] and lengths [B] with B = " << B;
  }
  const int64_t blocks = (tables.size(1) * page_size + kBlockTokens - 1) / kBlockTokens;
  const int64_t splits = std::min<int64_t>(blocks, kMaxSplits);
  check_dense(values, "values", {B, G, splits, kMaxGroup, d});
  check_dense(sums, "sums", {B, G, splits, kMaxGroup, 2});
  check_dense(out, "out", {B, H, d});
  for (TensorView x : {q, k, v, out}) check_dtype(x, "q, k, v and out", kBFloat16);
  check_dtype(values, "values", kFloat32);
  check_dtype(sums, "sums", kFloat32);
  check_index(tables, "tables");
  check_dtype(lengths, "lengths", tables.dtype());
  check_devices({q, k, v, tables, lengths, values, sums, out});
  if (H % G != 0 || H / G > kMaxGroup || (d != 64 && d != 128 && d != 256) || B > kMaxSequences) {
    TVM_FFI_THROW(ValueError) << "q must have at most " << kMaxSequences << " rows, 1 to 8 heads for each of "
                              << G << " KV heads, and head_dim 64, 128 or 256; got [" << B << ", " << H
                              << ", " << d << "]";
  }
  if (gate.has_value()) {
    check_rows(gate.value(), "gate", {B, H * d});
    check_dtype(gate.value(), "gate", kBFloat16);
    check_devices({q, gate.value()});
  }
  if (q.stride(0) % 8 != 0) TVM_FFI_THROW(ValueError) << "q's rows must begin at multiples of 16 bytes";
  if (B == 0) return;

  const Params params{data<bf16>(q),
                      data<bf16>(k),
                      data<bf16>(v),
                      tables.data_ptr(),
                      lengths.data_ptr(),
                      is(tables, kInt64),
                      q.stride(0),
                      tables.stride(0),
                      tables.stride(1),
                      lengths.stride(0),
                      data<float>(values),
                      data<float2>(sums),
                      data<bf16>(out),
                      gate.has_value() ? data<bf16>(gate.value()) : nullptr,
                      gate.has_value() ? gate.value().stride(0) : 0,
                      static_cast<int>(B),
                      static_cast<int>(H),
                      static_cast<int>(G),
                      static_cast<int>(page_size),
                      static_cast<int>(splits),
                      static_cast<float>(scale * 1.4426950408889634),
                      {ahead_of<Ahead>(first_ahead, q), ahead_of<Ahead>(second_ahead, q)}};
  tvm::ffi::CUDADeviceGuard guard(q.device().device_id);
  auto begin = d == 64 ? start<64> : d == 128 ? start<128> : start<256>;
  begin(params, B * G * splits, num_multiprocessors(q), current_stream(q), launch_with_pdl);
}

void run(TensorView q, TensorView k, TensorView v, TensorView tables, TensorView lengths, TensorView values,
         TensorView sums, TensorView out, Some gate, double scale, bool launch_with_pdl) {
  run_ahead(q, k, v, tables, lengths, values, sums, out, gate, scale, launch_with_pdl, {}, {});
}

}  // namespace crossfuse::paged

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_decode, crossfuse::paged::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_decode_ahead, crossfuse::paged::run_ahead);
