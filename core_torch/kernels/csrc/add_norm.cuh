// Residual add and RMSNorm, as ../contract.py has them: the sum rounded to bfloat16 is the new residual, and
// what is normed.
//
// Shapes: T tokens, D hidden. A block takes a token, 8 consecutive dims a thread; a sum's order depends on D
// alone.
#pragma once

#include "device.cuh"

namespace crossfuse::add_norm {

constexpr int kMaxDim = 8192, kMaxWarps = kMaxDim / 8 / kWarp;

struct Params {
  const bf16* summed;    // [T, D]
  const bf16* residual;  // [T, D] or null: nothing is added, and out_residual not written
  const bf16* weight;    // [D], and weight_bias is added
  bf16* out_residual;
  bf16* out_normed;
  int D;
  float eps, weight_bias;
};

__device__ __forceinline__ void unpack(float (&x)[8], const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_bf16(words[i]);
    x[2 * i + 1] = high_bf16(words[i]);
  }
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                    pack_bf16(x[6], x[7]));
}

__global__ void __launch_bounds__(kMaxWarps* kWarp) norm(const __grid_constant__ Params p) {
  __shared__ float squares[kMaxWarps];
  const int first = threadIdx.x * 8, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool has_dims = first < p.D;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.D + first;
  // A constant: on its way before the previous kernel ends.
  const uint4 raw_weight =
      has_dims ? *reinterpret_cast<const uint4*>(p.weight + first) : make_uint4(0, 0, 0, 0);
  wait_for_previous_grid();
  let_next_grid_start();

  float x[8] = {}, square = 0.0f;
  if (has_dims) {
    unpack(x, *reinterpret_cast<const uint4*>(p.summed + at));
    if (p.residual != nullptr) {
      float residual[8];
      unpack(residual, *reinterpret_cast<const uint4*>(p.residual + at));
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = round_bf16(residual[i] + x[i]);
      *reinterpret_cast<uint4*>(p.out_residual + at) = pack(x);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) square += x[i] * x[i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(kAllLanes, square, step);
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  // Every warp adds up all of them, alike.
  const int warps = blockDim.x / kWarp;
  float total = lane < warps ? squares[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
  if (!has_dims) return;
  const float factor = rsqrtf(total / p.D + p.eps);
  float weight[8];
  unpack(weight, raw_weight);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * factor * (p.weight_bias + weight[i]);
  *reinterpret_cast<uint4*>(p.out_normed + at) = pack(x);
}

}  // namespace crossfuse::add_norm
