// Both ends of a model whose vocabulary is split over ranks: a token's row of the embedding, and the best
// token.
//
// Shapes: T tokens, W this rank's entries of the vocabulary, D hidden.
//
//   rows    a block takes a token: its row, or zeros where another rank has it
//   argmax  a block takes a row of logits, NaN aside. A candidate is one number, as in ../vocabulary.py: the
//           logit's order in the high half, the entry, counted down, in the low one
#pragma once

#include "device.cuh"

namespace crossfuse::vocabulary {

constexpr int kRowThreads = 256, kArgmaxThreads = 1024;
constexpr int kAhead = 5;  // loads of 16 bytes that a thread has under way
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
  for (int i = threadIdx.x; i < p.D / 8; i += kRowThreads)
    target[i] = mine ? source[i] : make_uint4(0, 0, 0, 0);
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

// The largest of 8 logits.
__device__ __forceinline__ float largest_of(const uint4& raw) {
  const auto pair = [](const uint32_t& word) { return *reinterpret_cast<const __nv_bfloat162*>(&word); };
  const __nv_bfloat162 both = __hmax2(__hmax2(pair(raw.x), pair(raw.y)), __hmax2(pair(raw.z), pair(raw.w)));
  return fmaxf(to_float(both.x), to_float(both.y));
}

// First the largest value of the row, by few instructions a logit; then the first entry that has it, which a
// thread seeks only where its own largest value is that one.
__global__ void __launch_bounds__(kArgmaxThreads, 1) argmax(const __grid_constant__ Argmax p) {
  constexpr int kWarps = kArgmaxThreads / kWarp, kNowhere = 0x7fffffff;
  static_assert(kWarps == kWarp, "a warp has a lane for each warp's result");
  __shared__ float values[kWarps];
  __shared__ int entries[kWarps];
  wait_for_previous_grid();
  let_next_grid_start();
  const bf16* logits = p.logits + blockIdx.x * p.stride;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // Whole groups of 8 where the row begins at 16 bytes; the rest one by one.
  const int groups = reinterpret_cast<uintptr_t>(logits) % 16 == 0 ? p.W / 8 : 0;
  float best = -INFINITY, best_single = -INFINITY;
  int group = kNowhere, single = kNowhere;  // the first with that value
  for (int begin = threadIdx.x; begin < groups; begin += kAhead * kArgmaxThreads) {
    uint4 raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      raw[i] = load_once(logits + min(begin + i * kArgmaxThreads, groups - 1) * 8);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float value = largest_of(raw[i]);
      if (value > best || group == kNowhere) {
        best = value;
        group = min(begin + i * kArgmaxThreads, groups - 1);
      }
    }
  }
  for (int entry = groups * 8 + threadIdx.x; entry < p.W; entry += kArgmaxThreads) {
    const float value = to_float(logits[entry]);
    if (value > best_single || single == kNowhere) {
      best_single = value;
      single = entry;
    }
  }

  float most = fmaxf(best, best_single);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
  if (lane == 0) values[warp] = most;
  __syncthreads();
  most = values[lane];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));

  int entry = kNowhere;
  if (single != kNowhere && best_single == most) entry = single;
  if (group != kNowhere && best == most) {  // groups come before single entries
    for (int i = 7; i >= 0; --i) {
      if (to_float(logits[group * 8 + i]) == most) entry = group * 8 + i;
    }
  }
  entry = __reduce_min_sync(kAllLanes, entry);
  if (lane == 0) entries[warp] = entry;
  __syncthreads();
  if (warp > 0) return;
  entry = __reduce_min_sync(kAllLanes, entries[lane]);
  if (entry == kNowhere) entry = 0;  // nothing but NaN
  if (lane == 0)
    p.keys[blockIdx.x] = key_of(order_of(__bfloat16_as_ushort(__float2bfloat16(most))), p.first + entry);
}

}  // namespace crossfuse::vocabulary
