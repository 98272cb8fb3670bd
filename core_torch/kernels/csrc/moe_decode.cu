// TVM-FFI: moe_route(logits, weights, experts, tiles, num_experts, normalize, launch_with_pdl)
//          moe_group(experts, tiles, num_experts, launch_with_pdl)
//          moe_decode(x, weights, experts, tiles, gate_up, down, hidden, parts, out, launch_with_pdl)
//          moe_decode_ahead(the same, first, second), two tensors or None to be fetched into the L2 cache
//
// `moe_route`, or `moe_group` where the choice is made already, writes the list of tiles that `moe_decode`
// works through; tiles int32 [T K + 1, 16], hidden bfloat16 [T K, I] and parts float32 [T K, D] are scratch.
// On TVM-FFI's current stream; nothing is allocated.

#include <algorithm>

#include "host.cuh"
#include "moe_decode.cuh"

namespace crossfuse::moe {

Group grouping(TensorView experts, TensorView tiles, int64_t num_experts) {
  check_dense(experts, "experts", {-1, -1});
  check_index(experts, "experts");
  const int64_t pairs = experts.size(0) * experts.size(1);
  check_dense(tiles, "tiles", {pairs + 1, kRecord});
  check_dtype(tiles, "tiles", kInt32);
  if (num_experts < 1 || num_experts > kMaxExperts) {
    TVM_FFI_THROW(ValueError) << "num_experts must be 1 to " << kMaxExperts << ", got " << num_experts;
  }
  check_devices({experts, tiles});
  return {experts.data_ptr(), is(experts, kInt64), data<int32_t>(tiles), static_cast<int>(pairs),
          static_cast<int>(num_experts)};
}

void run_group(TensorView experts, TensorView tiles, int64_t num_experts, bool launch_with_pdl) {
  const Group params = grouping(experts, tiles, num_experts);
  tvm::ffi::CUDADeviceGuard guard(experts.device().device_id);
  launch({dim3(1), dim3(kGroupThreads), current_stream(experts), launch_with_pdl}, group, params);
}

void run_route(TensorView logits, TensorView weights, TensorView experts, TensorView tiles,
               int64_t num_experts, bool normalize, bool launch_with_pdl) {
  const int64_t shared = logits.ndim() == 2 ? logits.size(1) - num_experts : -1;
  if (shared != 0 && shared != 1) {
    TVM_FFI_THROW(ValueError) << "logits must be [T, " << num_experts
                              << "], or one wider with the shared expert's gate";
  }
  const Group grouping_params = grouping(experts, tiles, num_experts + shared);
  const int64_t T = experts.size(0), K = experts.size(1) - shared;
  check_rows(logits, "logits", {T, num_experts + shared});
  check_dense(weights, "weights", {T, K + shared});
  check_dtype(logits, "logits", kBFloat16);
  check_dtype(weights, "weights", kBFloat16);
  check_dtype(experts, "experts", kInt32);
  check_devices({logits, weights, experts, tiles});
  if (K < 1 || K > num_experts || K + shared > kWarp) {
    TVM_FFI_THROW(ValueError) << "1 to " << kWarp - shared << " of " << num_experts
                              << " experts can be chosen, got " << K;
  }
  const Route params{data<bf16>(logits),
                     logits.stride(0),
                     data<bf16>(weights),
                     data<int32_t>(experts),
                     grouping_params.tiles,
                     static_cast<int>(T),
                     static_cast<int>(num_experts),
                     static_cast<int>(K),
                     normalize,
                     shared == 1};
  tvm::ffi::CUDADeviceGuard guard(logits.device().device_id);
  auto kernel = num_experts <= 16 * kWarp ? route<16> : route<32>;
  const unsigned blocks = static_cast<unsigned>(
      std::clamp<int64_t>((T + kRouteTokens - 1) / kRouteTokens, 1, kRouteBlocks));
  launch({dim3(blocks), dim3(kGroupThreads), current_stream(logits), launch_with_pdl, blocks}, kernel,
         params);
}

using Some = tvm::ffi::Optional<TensorView>;

void run_experts_ahead(TensorView x, TensorView weights, TensorView experts, TensorView tiles,
                       TensorView gate_up_weight, TensorView down_weight, TensorView hidden, TensorView parts,
                       TensorView out, bool launch_with_pdl, Some first_ahead, Some second_ahead) {
  check_dense(down_weight, "down", {-1, -1, -1});
  const int64_t T = experts.size(0), K = experts.size(1);
  const int64_t N = down_weight.size(0), D = down_weight.size(1), I = down_weight.size(2);
  const Group routing = grouping(experts, tiles, N);
  if (D % 8 != 0 || I % 8 != 0) {
    TVM_FFI_THROW(ValueError) << "hidden size and intermediate size must be multiples of 8, got " << D
                              << " and " << I;
  }
  check_rows(x, "x", {T, D});
  check_dense(weights, "weights", {T, K});
  check_dense(gate_up_weight, "gate_up", {N, 2 * I, D});
  check_dense(hidden, "hidden", {T * K, I});
  check_dense(parts, "parts", {T * K, D});
  check_dense(out, "out", {T, D});
  check_dtype(x, "x", kBFloat16);
  check_dtype(weights, "weights", kBFloat16);
  check_dtype(gate_up_weight, "gate_up", kBFloat16);
  check_dtype(down_weight, "down", kBFloat16);
  check_dtype(hidden, "hidden", kBFloat16);
  check_dtype(parts, "parts", kFloat32);
  check_dtype(out, "out", kBFloat16);
  check_devices({x, weights, experts, gate_up_weight, down_weight, hidden, parts, out});
  if (x.stride(0) % 8 != 0) TVM_FFI_THROW(ValueError) << "x's rows must begin at multiples of 16 bytes";
  if (T == 0) return;

  const Experts params{data<bf16>(x),        data<bf16>(gate_up_weight), data<bf16>(down_weight),
                       data<int32_t>(tiles), data<bf16>(hidden),         data<float>(parts),
                       x.stride(0),          static_cast<int>(D),        static_cast<int>(I),
                       static_cast<int>(K)};
  const Combine last{routing,         data<float>(parts),  data<bf16>(weights),
                     data<bf16>(out), static_cast<int>(D), static_cast<int>(K),
                     {ahead_of<Ahead>(first_ahead, x), ahead_of<Ahead>(second_ahead, x)}};
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  const cudaStream_t stream = current_stream(x);
  const unsigned resident = static_cast<unsigned>(num_multiprocessors(x)) * kBlocks;
  const auto blocks = [&](int64_t most) {
    return dim3(static_cast<unsigned>(std::min<int64_t>(most, resident)));
  };
  const dim3 block(kWarps * kWarp);
  launch({blocks(T * K * (I / 8)), block, stream, launch_with_pdl}, gate_up, params);
  if (T <= kFewTokens && K <= kFewChoices) {
    const dim3 grid(static_cast<unsigned>((D + kTileRows - 1) / kTileRows), static_cast<unsigned>(T));
    launch({grid, dim3(static_cast<unsigned>(K) * kWarp), stream, launch_with_pdl}, down_few, params, last);
    return;
  }
  launch({blocks(T * K * ((D + 63) / 64)), block, stream, launch_with_pdl}, down, params);
  constexpr unsigned kColumns = 128 * 4;
  launch({dim3(static_cast<unsigned>(D + kColumns - 1) / kColumns, static_cast<unsigned>(T)), dim3(128),
          stream, launch_with_pdl},
         combine, last);
}

void run_experts(TensorView x, TensorView weights, TensorView experts, TensorView tiles,
                 TensorView gate_up_weight, TensorView down_weight, TensorView hidden, TensorView parts,
                 TensorView out, bool launch_with_pdl) {
  run_experts_ahead(x, weights, experts, tiles, gate_up_weight, down_weight, hidden, parts, out,
                    launch_with_pdl, {}, {});
}

}  // namespace crossfuse::moe

TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_route, crossfuse::moe::run_route);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_group, crossfuse::moe::run_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_decode, crossfuse::moe::run_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_decode_ahead, crossfuse::moe::run_experts_ahead);
