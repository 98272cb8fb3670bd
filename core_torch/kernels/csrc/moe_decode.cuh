// The routed experts for few tokens: every chosen expert's weights stream through the tensor cores once.
//
// Shapes: T tokens, D hidden, N experts, K experts a token, I intermediate. A pair is a (token, choice): t K + k. A tile
// is up to 8 pairs of one expert; its weights are the 16-row operand of the tensor cores, its tokens the 8 columns.
// More tiles of one expert follow one another, so that they find its weights in the L2 cache.
//
//   route    the choices from the router's logits, and the list of tiles, in one block: a warp takes a token
//   group    the list of tiles alone
//   gate_up  h[pair] = silu(gate x) * (up x), [T K, I]: a block takes 8 rows of gate and the 8 of up below them, so that
//            both meet in one thread; its 4 warps share the sum over D
//   down     y[pair] = down h[pair], [T K, D] in float32: a warp takes 16 rows
//   combine  out[t] = sum over k of weights[t, k] y[t K + k]
//
// A token's sums have one order whatever else is in the batch, and there are no floating-point atomics.
#pragma once

#include "device.cuh"

namespace crossfuse::moe {

constexpr int kTileTokens = 8, kTileRows = 16;
constexpr int kRecord = 16;  // int32 of a tile in the list: expert, number of pairs, the pairs; the first is the count
constexpr int kGroupThreads = 1024, kMaxExperts = 1024;
constexpr int kWarps = 4;   // of a block of gate_up and down
constexpr int kBlocks = 5;  // on a multiprocessor at once
constexpr int kChunk = 32;  // columns that a warp loads with one instruction a row
constexpr int kStep = 2;    // chunks between two waits
constexpr int kStages = 3;  // steps under way: 20 warps * 2 steps * 2 KiB of weights at least

struct Group {
  const void* experts;  // [T, K]; ids outside 0..N-1 are skipped: rows that pad a batch
  bool wide;            // int64, not int32
  int32_t* tiles;       // [T K + 1, kRecord]
  int pairs, N;
};

__device__ __forceinline__ int expert_of(const Group& p, int pair) {
  const int64_t id = p.wide ? static_cast<const int64_t*>(p.experts)[pair] : static_cast<const int32_t*>(p.experts)[pair];
  return id >= 0 && id < p.N ? static_cast<int>(id) : -1;
}

// The tiles of all experts in order. Within an expert the pairs' order is any: a column does not touch its neighbours.
// By one block of kGroupThreads.
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
  const int lane = threadIdx.x % kWarp, choices = p.K + p.shared;
  for (int token = threadIdx.x / kWarp; token < p.T; token += kGroupThreads / kWarp) {
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
          for (int i = 0; i < kPerLane; ++i) everything += keys[i] ? expf(key_logit(keys[i]) - key_logit(top)) : 0.0f;
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
  __syncthreads();
  list_tiles({p.experts, false, p.tiles, p.T * choices, p.N + p.shared});
}

// A tile's record lies in a warp, a word a lane. Lane l has the weight rows l / 4 and l / 4 + 8, the token column l / 4,
// and in results the token columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ int record_word(const int32_t* tiles, int tile) {
  return tiles[(1 + tile) * kRecord + threadIdx.x % kRecord];
}
__device__ __forceinline__ int tile_expert(int word) { return __shfl_sync(kAllLanes, word, 0); }
__device__ __forceinline__ int tile_pair(int word, int column) {  // -1: the tile has no such column
  const int count = __shfl_sync(kAllLanes, word, 1), pair = __shfl_sync(kAllLanes, word, 2 + column);
  return column < count ? pair : -1;
}

// What one lane has under way: 8 columns of two weight rows and of a token, for each chunk. A lane reads only what it
// copied itself, so that the pipeline needs no barriers.
struct Stage {
  uint4 low[kStep][kWarp], high[kStep][kWarp], token[kStep][kWarp];
};

// The columns `begin` to `end` of two weight rows and of a token (or none), as one lane copies them.
struct Rows {
  const bf16 *low, *high, *token;
  int left;
  bool has_token;

  __device__ __forceinline__ Rows(const bf16* low_row, const bf16* high_row, const bf16* token_row, bool has_token,
                                  int begin, int end)
      : has_token(has_token) {
    const int first = begin + threadIdx.x % 4 * 8;
    low = low_row + first;
    high = high_row + first;
    token = token_row + first;
    left = end - first;
  }

  __device__ __forceinline__ void copy(Stage& stage) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const bool valid = i * kChunk < left;
      const int column = valid ? i * kChunk : 0;
      copy_async(&stage.low[i][lane], low + column, valid);
      copy_async(&stage.high[i][lane], high + column, valid);
      copy_async(&stage.token[i][lane], token + column, valid && has_token);
    }
    const int step = left > kStep * kChunk ? kStep * kChunk : 0;
    low += step;
    high += step;
    token += step;
    left -= kStep * kChunk;
  }
};

// One warp works through the items first, first + stride, ... below `work`, each [16 rows x 8 tokens] over `columns`
// columns. `open(item, word)` gives its rows, `close(item, word, result)` takes the product; word is the tile's record.
// Copies run kStages - 1 steps ahead, also into the next item. The result holds, in lane l, [l / 4, 2 (l % 4)],
// [l / 4, 2 (l % 4) + 1] and the same columns of row l / 4 + 8.
template <typename Open, typename Close>
__device__ __forceinline__ void stream(Stage (&stages)[kStages], const int32_t* tiles, int blocks, int first, int stride,
                                       int work, int columns, Open open, Close close) {
  if (first >= work) return;
  const int lane = threadIdx.x % kWarp, steps = (columns + kStep * kChunk - 1) / (kStep * kChunk);
  int ahead = first, ahead_step = 0;
  int word = record_word(tiles, first / blocks), next_word = word;
  Rows rows = open(first, word);
  const auto fetch = [&](Stage& stage) {
    if (ahead < work) {
      rows.copy(stage);
      if (ahead_step == 0 && ahead + stride < work) next_word = record_word(tiles, (ahead + stride) / blocks);
      if (++ahead_step == steps) {
        ahead += stride;
        ahead_step = 0;
        if (ahead < work) rows = open(ahead, next_word);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(stages[i]);
  int turn = 0;
  for (int item = first; item < work; item += stride) {
    word = record_word(tiles, item / blocks);
    float even[4] = {}, odd[4] = {};
    for (int step = 0; step < steps; ++step) {
      fetch(stages[turn == 0 ? kStages - 1 : turn - 1]);
      wait_for_copies<kStages - 1>();
      const Stage& stage = stages[turn];
      // The order of the columns within a chunk is the same in weights and tokens, so it may be any.
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const uint4 low = stage.low[i][lane], high = stage.high[i][lane], token = stage.token[i][lane];
        multiply_add(even, low.x, high.x, low.y, high.y, token.x, token.y);
        multiply_add(odd, low.z, high.z, low.w, high.w, token.z, token.w);
      }
      turn = turn == kStages - 1 ? 0 : turn + 1;
    }
    close(item, word, make_float4(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]));
  }
}

struct Experts {
  const bf16* x;         // [T, D]
  const bf16* gate_up;   // [N, 2 I, D], gate rows first
  const bf16* down;      // [N, D, I]
  const int32_t* tiles;  // from `group`
  bf16* hidden;          // [T K, I]
  float* parts;          // [T K, D]
  int64_t x_stride;
  int D, I, K;
};

__global__ void __launch_bounds__(kWarps * kWarp, kBlocks) gate_up(const __grid_constant__ Experts p) {
  __shared__ Stage stages[kWarps][kStages];
  __shared__ float4 sums[2][kWarps][kWarp];
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, blocks = p.I / 8;
  const int share = (p.D + kWarps * kChunk - 1) / (kWarps * kChunk) * kChunk;  // of the sum over D
  const int begin = min(warp * share, p.D), end = min(begin + share, p.D);
  int turn = 0;
  const auto open = [&](int item, int word) {
    const int pair = tile_pair(word, lane / 4);
    const bf16* gate = p.gate_up + (static_cast<int64_t>(tile_expert(word)) * 2 * p.I + item % blocks * 8 + lane / 4) * p.D;
    return Rows(gate, gate + p.I * p.D, p.x + max(pair, 0) / p.K * p.x_stride, pair >= 0, begin, end);
  };
  const auto close = [&](int item, int word, float4 result) {
    sums[turn][warp][lane] = result;
    __syncthreads();  // the two halves of `sums` take turns, so one barrier an item is enough
    if (warp == 0) {
      float4 total = result;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const float4 other = sums[turn][w][lane];
        total = make_float4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
      }
      const int first = tile_pair(word, lane % 4 * 2), second = tile_pair(word, lane % 4 * 2 + 1);
      const int row = item % blocks * 8 + lane / 4;
      // Rounded where the plain path rounds.
      if (first >= 0) p.hidden[first * p.I + row] = bf16(round_bf16(silu(round_bf16(total.x))) * round_bf16(total.z));
      if (second >= 0) p.hidden[second * p.I + row] = bf16(round_bf16(silu(round_bf16(total.y))) * round_bf16(total.w));
    }
    turn ^= 1;
  };
  stream(stages[warp], p.tiles, blocks, blockIdx.x, gridDim.x, p.tiles[0] * blocks, share, open, close);
}

__global__ void __launch_bounds__(kWarps * kWarp, kBlocks) down(const __grid_constant__ Experts p) {
  __shared__ Stage stages[kWarps][kStages];
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int blocks = (p.D + kTileRows - 1) / kTileRows;
  const auto open = [&](int item, int word) {
    const int pair = tile_pair(word, lane / 4), low = item % blocks * kTileRows + lane / 4;
    const bf16* weight = p.down + static_cast<int64_t>(tile_expert(word)) * p.D * p.I;
    return Rows(weight + min(low, p.D - 1) * p.I, weight + min(low + 8, p.D - 1) * p.I, p.hidden + max(pair, 0) * p.I,
                pair >= 0, 0, p.I);
  };
  const auto close = [&](int item, int word, float4 sum) {
    const int first = tile_pair(word, lane % 4 * 2), second = tile_pair(word, lane % 4 * 2 + 1);
    const int low = item % blocks * kTileRows + lane / 4, high = low + 8;
    if (first >= 0 && low < p.D) p.parts[first * p.D + low] = sum.x;
    if (second >= 0 && low < p.D) p.parts[second * p.D + low] = sum.y;
    if (first >= 0 && high < p.D) p.parts[first * p.D + high] = sum.z;
    if (second >= 0 && high < p.D) p.parts[second * p.D + high] = sum.w;
  };
  stream(stages[warp], p.tiles, blocks, blockIdx.x * kWarps + warp, gridDim.x * kWarps, p.tiles[0] * blocks, p.I, open,
         close);
}

struct Combine {
  Group routing;
  const float* parts;   // [T K, D]
  const bf16* weights;  // [T, K]
  bf16* out;            // [T, D]
  int D, K;
};

// A block takes 4 columns a thread of one token.
__global__ void combine(const __grid_constant__ Combine p) {
  wait_for_previous_grid();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, token = blockIdx.y;
  if (column >= p.D) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int k = 0; k < p.K; ++k) {
    const int pair = token * p.K + k;
    if (expert_of(p.routing, pair) < 0) continue;
    const float weight = to_float(p.weights[pair]);
    const float4 part = *reinterpret_cast<const float4*>(p.parts + static_cast<int64_t>(pair) * p.D + column);
    sum = make_float4(sum.x + weight * part.x, sum.y + weight * part.y, sum.z + weight * part.z, sum.w + weight * part.w);
  }
  *reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(token) * p.D + column) =
      make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}

}  // namespace crossfuse::moe
