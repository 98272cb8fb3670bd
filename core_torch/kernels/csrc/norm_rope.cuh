// What comes between attention's projection and attention: RMSNorm of q and k per head, partial rotary
// embedding, and the new keys and values into the paged cache. It rounds where ../norm.py and ../rope.py do.
//
// Shapes: T tokens, H query heads, G KV heads, d head_dim, R rotary_dim. A block takes a token; a warp takes
// heads, 8 consecutive dims a lane.
#pragma once

#include "device.cuh"

namespace crossfuse::norm_rope {

constexpr int kMaxDim = 256, kMaxWarps = 16;

struct Params {
  const bf16* projected;  // [T, (2 H + 2 G) d]: q, output gate, k, v
  int64_t projected_stride;
  const void* positions;  // [T]
  const void* slots;      // [T], page * page_size + offset
  bool wide;              // int64, not int32
  int64_t positions_stride, slots_stride;
  const bf16* q_weight;  // [d], and weight_bias is added
  const bf16* k_weight;
  bf16* k_cache;  // [places, G, d]
  bf16* v_cache;
  bf16* q;  // [T, H, d]
  int H, G, d, R;
  float theta, eps, weight_bias;
};

__device__ __forceinline__ int64_t index(const Params& p, const void* array, int64_t i) {
  return p.wide ? static_cast<const int64_t*>(array)[i] : static_cast<const int32_t*>(array)[i];
}

__global__ void __launch_bounds__(kMaxWarps* kWarp) write(const __grid_constant__ Params p) {
  __shared__ float cosine[kMaxDim / 2], sine[kMaxDim / 2];
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, half = p.R / 2;
  const int64_t token = blockIdx.x;
  const int64_t place = index(p, p.slots, token * p.slots_stride);
  const float position = static_cast<float>(index(p, p.positions, token * p.positions_stride));
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const float angle = position * (1.0f / powf(p.theta, static_cast<float>(2 * i) / p.R));
    cosine[i] = round_bf16(cosf(angle));
    sine[i] = round_bf16(sinf(angle));
  }
  __syncthreads();

  const bf16* row = p.projected + token * p.projected_stride;
  const int first = lane * 8, lanes = half / 8;  // of each half of the rotary dims
  const bool has_dims = first < p.d;
  for (int head = threadIdx.x / kWarp; head < p.H + 2 * p.G; head += warps) {
    const bool is_q = head < p.H, is_v = head >= p.H + p.G;
    const bf16* source = row + (is_q ? head : head + p.H) * p.d + first;
    bf16* target = (is_q ? p.q + (token * p.H + head) * p.d
                         : (is_v ? p.v_cache + (place * p.G + head - p.H - p.G) * p.d
                                 : p.k_cache + (place * p.G + head - p.H) * p.d)) +
                   first;
    const uint4 raw = has_dims ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    if (is_v) {
      if (has_dims) *reinterpret_cast<uint4*>(target) = raw;
      continue;
    }
    float x[8] = {low_bf16(raw.x), high_bf16(raw.x), low_bf16(raw.y), high_bf16(raw.y),
                  low_bf16(raw.z), high_bf16(raw.z), low_bf16(raw.w), high_bf16(raw.w)};
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) square += x[j] * x[j];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(kAllLanes, square, step);
    const float factor = rsqrtf(square / p.d + p.eps);
    const bf16* weight = (is_q ? p.q_weight : p.k_weight) + (has_dims ? first : 0);
    const bool is_first = lane < lanes, turns = lane < 2 * lanes;
    const int partner = is_first ? lane + lanes : turns ? lane - lanes : lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = round_bf16(x[j] * factor * (p.weight_bias + to_float(weight[j])));
      const float other = __shfl_sync(kAllLanes, x[j], partner);
      if (turns) {  // x cos - y sin of the first half, y cos + x sin of the second
        const int i = (is_first ? lane : partner) * 8 + j;
        const float mine = round_bf16(x[j] * cosine[i]), its = round_bf16(other * sine[i]);
        x[j] = is_first ? mine - its : mine + its;
      }
    }
    if (has_dims) {
      *reinterpret_cast<uint4*>(target) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                                     pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
  }
}

}  // namespace crossfuse::norm_rope
