// TVM-FFI: norm_rope(projected, positions, slots, q_weight, k_weight, k_cache, v_cache, q,
//                    rotary_dim, theta, eps, weight_bias, launch_with_pdl)
//
// On TVM-FFI's current stream; the caches change in place, q is written; nothing is allocated.

#include "host.cuh"
#include "norm_rope.cuh"

namespace crossfuse::norm_rope {

void run(TensorView projected, TensorView positions, TensorView slots, TensorView q_weight,
         TensorView k_weight, TensorView k_cache, TensorView v_cache, TensorView q, int64_t rotary_dim,
         double theta, double eps, double weight_bias, bool launch_with_pdl) {
  check_dense(q, "q", {-1, -1, -1});
  const int64_t T = q.size(0), H = q.size(1), d = q.size(2);
  check_dense(k_cache, "k_cache", {-1, -1, -1, d});
  const int64_t G = k_cache.size(2);
  check_dense(v_cache, "v_cache", {k_cache.size(0), k_cache.size(1), G, d});
  check_rows(projected, "projected", {T, 2 * (H + G) * d});
  check_dense(q_weight, "q_weight", {d});
  check_dense(k_weight, "k_weight", {d});
  for (TensorView x : {projected, q_weight, k_weight, k_cache, v_cache, q}) {
    check_dtype(x, "projected, weights, caches and q", kBFloat16);
  }
  check_index(positions, "positions");
  check_dtype(slots, "slots", positions.dtype());
  if (positions.ndim() != 1 || positions.size(0) != T || slots.ndim() != 1 || slots.size(0) != T) {
    TVM_FFI_THROW(ValueError) << "positions and slots must be [T] with T = " << T;
  }
  if (d % 8 != 0 || d > kMaxDim || rotary_dim % 16 != 0 || rotary_dim > d || projected.stride(0) % 8 != 0) {
    TVM_FFI_THROW(ValueError) << "head_dim must be a multiple of 8 up to " << kMaxDim
                              << ", rotary_dim one of 16, and"
                              << " projected's rows begin at multiples of 16 bytes; got " << d << ", "
                              << rotary_dim << " and a stride of " << projected.stride(0);
  }
  check_devices({projected, positions, slots, q_weight, k_weight, k_cache, v_cache, q});
  if (T == 0) return;

  const Params params{data<bf16>(projected),
                      projected.stride(0),
                      positions.data_ptr(),
                      slots.data_ptr(),
                      is(positions, kInt64),
                      positions.stride(0),
                      slots.stride(0),
                      data<bf16>(q_weight),
                      data<bf16>(k_weight),
                      data<bf16>(k_cache),
                      data<bf16>(v_cache),
                      data<bf16>(q),
                      static_cast<int>(H),
                      static_cast<int>(G),
                      static_cast<int>(d),
                      static_cast<int>(rotary_dim),
                      static_cast<float>(theta),
                      static_cast<float>(eps),
                      static_cast<float>(weight_bias)};
  tvm::ffi::CUDADeviceGuard guard(q.device().device_id);
  const unsigned warps = static_cast<unsigned>(std::min<int64_t>(H + 2 * G, kMaxWarps));
  launch({dim3(static_cast<unsigned>(T)), dim3(warps * kWarp), current_stream(q), launch_with_pdl}, write,
         params);
}

}  // namespace crossfuse::norm_rope

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope, crossfuse::norm_rope::run);
