// Both ends of a model whose vocabulary is split over ranks: a token's row of the embedding, and the best token.
//
// Shapes: T tokens, W this rank's entries of the vocabulary, D hidden.
//
//   rows    a block takes a token: its row, or zeros where another rank has it
//   argmax  a block takes a row of logits. A candidate is one number, as in ../vocabulary.py: the logit's order
//           in the high half, the entry, counted down, in the low one
#pragma once

#include "device.cuh"

namespace crossfuse::vocabulary {

constexpr int kRowThreads = 256, kArgmaxThreads = 1024, kAhead = 5;  // loads of 16 bytes that a thread has under way
constexpr int32_t kLowHalf = 0x7fffffff;

struct Rows {
  const void* tokens;  // [T]
  bool wide;           // int64, not int32
  int64_t stride;
  const bf16* weight;  // [W, D]
  bf16* out;           // [T, D]
  int64_t first, count;
  int D;
};

__global__ void __launch_bounds__(kRowThreads) rows(const __grid_constant__ Rows p) {
  wait_for_previous_grid();
  let_next_grid_start();
  const int64_t at = blockIdx.x * p.stride;
  const int64_t token =
      p.wide ? static_cast<const int64_t*>(p.tokens)[at] : static_cast<const int32_t*>(p.tokens)[at];
  const int64_t row = token - p.first;
  const bool mine = row >= 0 && row < p.count;
  const uint4* source = reinterpret_cast<const uint4*>(p.weight + (mine ? row : 0) * p.D);
  uint4* target = reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(blockIdx.x) * p.D);
  for (int i = threadIdx.x; i < p.D / 8; i += kRowThreads) target[i] = mine ? source[i] : make_uint4(0, 0, 0, 0);
}

struct Argmax {
  const bf16* logits;  // [T, W]
  int64_t stride;
  int64_t* keys;  // [T]
  int W;
  int32_t first;
};

// The order of a bfloat16's bits as a signed number; -0 is 0, which it equals.
__device__ __forceinline__ int32_t order_of(uint32_t bits) {
  const int32_t wide = static_cast<int32_t>((bits == 0x8000u ? 0u : bits) << 16);
  return wide ^ ((wide >> 31) & kLowHalf);
}

__device__ __forceinline__ int64_t key_of(int32_t order, int32_t entry) {
  return (static_cast<int64_t>(order) << 32) | static_cast<int64_t>(kLowHalf - entry);
}

__global__ void __launch_bounds__(kArgmaxThreads) argmax(const __grid_constant__ Argmax p) {
  constexpr int kWarps = kArgmaxThreads / kWarp;
  __shared__ int64_t of_warp[kWarps];
  wait_for_previous_grid();
  let_next_grid_start();
  const bf16* logits = p.logits + blockIdx.x * p.stride;
  int64_t best = INT64_MIN;
  const auto take = [&](uint32_t bits, int entry) {
    const int64_t key = key_of(order_of(bits), p.first + entry);
    best = key > best ? key : best;
  };
  // Whole groups of 8 where the row begins at 16 bytes; the rest one by one.
  const int groups = reinterpret_cast<uintptr_t>(logits) % 16 == 0 ? p.W / 8 : 0;
  for (int begin = threadIdx.x; begin < groups; begin += kAhead * kArgmaxThreads) {
    uint4 raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      raw[i] = load_once(logits + min(begin + i * kArgmaxThreads, groups - 1) * 8);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int entry = min(begin + i * kArgmaxThreads, groups - 1) * 8;
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        take(words[w] & 0xffffu, entry + 2 * w);
        take(words[w] >> 16, entry + 2 * w + 1);
      }
    }
  }
  for (int entry = groups * 8 + threadIdx.x; entry < p.W; entry += kArgmaxThreads)
    take(__bfloat16_as_ushort(logits[entry]), entry);

  const auto largest_in_warp = [&] {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const int64_t other = __shfl_xor_sync(kAllLanes, best, step);
      best = other > best ? other : best;
    }
  };
  largest_in_warp();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  best = of_warp[threadIdx.x];
  largest_in_warp();
  if (threadIdx.x == 0) p.keys[blockIdx.x] = best;
}

}  // namespace crossfuse::vocabulary
