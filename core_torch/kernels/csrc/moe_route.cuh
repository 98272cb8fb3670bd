// Which experts a token takes, and the list that the expert kernels work through.
//
// Shapes: T tokens, N experts, K experts a token. A pair is a (token, choice): t K + k. A tile is up to 8
// pairs of one expert.
//
//   route  the choices from the router's logits, and the list of tiles, in one cluster: a warp takes a token
//   group  the list of tiles alone
#pragma once

#include "device.cuh"

namespace crossfuse::moe {

constexpr int kTileTokens = 8;
// A tile in the list, as int32: its expert, its number of pairs, the pairs. The list begins with a record
// that holds the number of tiles.
constexpr int kRecord = 16;
constexpr int kGroupThreads = 1024, kMaxExperts = 1024;
constexpr int kRouteBlocks = 8;  // of a cluster at most
constexpr int kRouteTokens = 8;  // of a block before another one joins: two warps a scheduler

struct Group {
  const void* experts;  // [T, K]; ids outside 0..N-1 are skipped: rows that pad a batch
  bool wide;            // int64, not int32
  int32_t* tiles;       // [T K + 1, kRecord]
  int pairs, N;
};

__device__ __forceinline__ int expert_of(const Group& p, int pair) {
  const int64_t id =
      p.wide ? static_cast<const int64_t*>(p.experts)[pair] : static_cast<const int32_t*>(p.experts)[pair];
  return id >= 0 && id < p.N ? static_cast<int>(id) : -1;
}

// The tiles of all experts in order. Within an expert the pairs' order is any: a column does not touch its
// neighbours. By one block of kGroupThreads.
__device__ __forceinline__ void list_tiles(const Group& p) {
  __shared__ int count[kMaxExperts], placed[kMaxExperts], first_tile[kMaxExperts], warp_total[kWarp];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  count[thread] = placed[thread] = 0;
  __syncthreads();
  for (int pair = thread; pair < p.pairs; pair += kGroupThreads) {
    const int expert = expert_of(p, pair);
    if (expert >= 0) atomicAdd(&count[expert], 1);
  }
  __syncthreads();

  const int tiles = (count[thread] + kTileTokens - 1) / kTileTokens;
  int until = tiles;  // of this expert and those before it: in the warp, then in the block
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, until, step);
    if (lane >= step) until += before;
  }
  if (lane == kWarp - 1) warp_total[warp] = until;
  __syncthreads();
  for (int w = 0; w < warp; ++w) until += warp_total[w];
  first_tile[thread] = until - tiles;
  if (thread == kGroupThreads - 1) p.tiles[0] = until;
  for (int i = 0; i < tiles; ++i) {
    int32_t* record = p.tiles + (1 + until - tiles + i) * kRecord;
    record[0] = thread;
    record[1] = min(count[thread] - i * kTileTokens, kTileTokens);
  }
  __syncthreads();
  for (int pair = thread; pair < p.pairs; pair += kGroupThreads) {
    const int expert = expert_of(p, pair);
    if (expert < 0) continue;
    const int place = atomicAdd(&placed[expert], 1);
    p.tiles[(1 + first_tile[expert] + place / kTileTokens) * kRecord + 2 + place % kTileTokens] = pair;
  }
}

__global__ void __launch_bounds__(kGroupThreads) group(const __grid_constant__ Group p) {
  wait_for_previous_grid();
  let_next_grid_start();
  list_tiles(p);
}

struct Route {
  const bf16* logits;  // [T, N], or [T, N + 1] with the logit of the shared expert's gate last
  int64_t logits_stride;
  bf16* weights;  // [T, K], or [T, K + 1]: the shared expert is number N, after the chosen ones
  int32_t* experts;
  int32_t* tiles;
  int T, N, K;
  bool normalize, shared;
};

// A bfloat16's order as an unsigned number, above the bits that put the lower of two equal experts first.
__device__ __forceinline__ uint32_t sort_key(bf16 logit, int expert) {
  const uint32_t bits = __bfloat16_as_ushort(logit);
  const uint32_t ordered = bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
  return ordered << 16 | (0xffffu - expert);
}
__device__ __forceinline__ int key_expert(uint32_t key) { return 0xffff - static_cast<int>(key & 0xffffu); }
__device__ __forceinline__ float key_logit(uint32_t key) {
  const uint32_t ordered = key >> 16;
  return __uint_as_float((ordered & 0x8000u ? ordered & 0x7fffu : ~ordered & 0xffffu) << 16);
}

template <int kPerLane>  // N <= 32 kPerLane
__global__ void __launch_bounds__(kGroupThreads) route(const __grid_constant__ Route p) {
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, choices = p.K + p.shared, blocks = gridDim.x;
  for (int token = threadIdx.x / kWarp * blocks + blockIdx.x; token < p.T;
       token += kGroupThreads / kWarp * blocks) {
    const bf16* logits = p.logits + token * p.logits_stride;
    uint32_t keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kWarp;
      keys[i] = expert < p.N ? sort_key(logits[expert], expert) : 0;
    }
    uint32_t mine = 0, top = 0;  // lane k keeps choice k
    float everything = 0.0f;
    for (int k = 0; k < p.K; ++k) {
      uint32_t best = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
      best = __reduce_max_sync(kAllLanes, best);
      if (k == 0) {
        top = best;
        if (!p.normalize) {
#pragma unroll
          for (int i = 0; i < kPerLane; ++i)
            everything += keys[i] ? expf(key_logit(keys[i]) - key_logit(top)) : 0.0f;
        }
      }
      if (lane == k) mine = best;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
    }
    const float share = lane < p.K ? expf(key_logit(mine) - key_logit(top)) : 0.0f;
    float sum = p.normalize ? share : everything;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane < p.K) {
      p.weights[token * choices + lane] = __float2bfloat16(share / sum);
      p.experts[token * choices + lane] = key_expert(mine);
    } else if (lane < choices) {
      p.weights[token * choices + lane] = __float2bfloat16(sigmoid(to_float(logits[p.N])));
      p.experts[token * choices + lane] = p.N;
    }
  }
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_sync();
    if (blockIdx.x > 0) return;
  }
  list_tiles({p.experts, false, p.tiles, p.T * choices, p.N + p.shared});
}

}  // namespace crossfuse::moe
