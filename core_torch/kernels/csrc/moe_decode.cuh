// The routed experts for few tokens: every chosen expert's weights stream through the tensor cores once.
//
// Shapes: T tokens, D hidden, N experts, K experts a token, I intermediate; pairs and tiles as in
// moe_route.cuh. A tile's weights are the 16-row operand of the tensor cores, its tokens the 8 columns. Tiles
// of one expert follow one another, so that they find its weights in the L2 cache.
//
//   gate_up  h[pair] = silu(gate x) * (up x), [T K, I]: a block takes 8 rows of gate and the same 8 of up, so
//            that both meet in one thread; its 4 warps share the sum over D
//   down     y[pair] = down h[pair], [T K, D] in float32: a warp takes 16 rows
//   combine  out[t] = sum over k of weights[t, k] y[t K + k]
//   down_few both at once, for so few tokens that hardly an expert has two: a block takes 16 rows of a token's
//            result, a warp one of the token's experts
//
// A token's sums have one order whatever else is in the batch, and there are no floating-point atomics.
#pragma once

#include "device.cuh"
#include "moe_route.cuh"

namespace crossfuse::moe {

constexpr int kTileRows = 16;
constexpr int kWarps = 4;   // of a block of gate_up and down
constexpr int kBlocks = 5;  // on a multiprocessor at once
constexpr int kChunk = 32;  // columns that a warp loads with one instruction a row
constexpr int kStep = 2;    // chunks between two waits
constexpr int kStages = 3;  // steps under way: 20 warps * 2 steps * 2 KiB of weights at least
constexpr int kLine = 64;   // columns in a line of the L2 cache
constexpr int kFewTokens = 4, kFewChoices = 16, kFewChunks = 4;  // of down_few: chunks a lane has under way

// A tile's record lies in a warp, a word a lane. Lane l has the weight rows l / 4 and l / 4 + 8, the token
// column l / 4, and in results the token columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ int record_word(const int32_t* tiles, int tile) {
  return tiles[(1 + tile) * kRecord + threadIdx.x % kRecord];
}
__device__ __forceinline__ int tile_expert(int word) { return __shfl_sync(kAllLanes, word, 0); }
__device__ __forceinline__ int tile_pair(int word, int column) {  // -1: the tile has no such column
  const int count = __shfl_sync(kAllLanes, word, 1), pair = __shfl_sync(kAllLanes, word, 2 + column);
  return column < count ? pair : -1;
}

// What one lane has under way: 8 columns of two weight rows and of a token, for each chunk. A lane reads only
// what it copied itself, so that the pipeline needs no barriers.
struct Stage {
  uint4 low[kStep][kWarp], high[kStep][kWarp], token[kStep][kWarp];
};

// The columns `begin` to `end` of two weight rows and of a token (or none), as one lane copies them.
struct Rows {
  const bf16 *low, *high, *token;
  int left;
  bool has_token;

  __device__ __forceinline__ Rows(const bf16* low_row, const bf16* high_row, const bf16* token_row,
                                  bool has_token, int begin, int end)
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

// One warp works through the items first, first + stride, ... below `work`, each [16 rows x 8 tokens] over
// `columns` columns. `open(item, word)` gives its rows, `close(item, word, result)` takes the product; word
// is the tile's record. Copies run kStages - 1 steps ahead, also into the next item. The result holds, in
// lane l, [l / 4, 2 (l % 4)], [l / 4, 2 (l % 4) + 1] and the same columns of row l / 4 + 8.
template <typename Open, typename Close>
__device__ __forceinline__ void stream(Stage (&stages)[kStages], const int32_t* tiles, int blocks, int first,
                                       int stride, int work, int columns, Open open, Close close) {
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

__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) gate_up(const __grid_constant__ Experts p) {
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
    const bf16* gate =
        p.gate_up + (static_cast<int64_t>(tile_expert(word)) * 2 * p.I + item % blocks * 8 + lane / 4) * p.D;
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
      if (first >= 0)
        p.hidden[first * p.I + row] = bf16(round_bf16(silu(round_bf16(total.x))) * round_bf16(total.z));
      if (second >= 0)
        p.hidden[second * p.I + row] = bf16(round_bf16(silu(round_bf16(total.y))) * round_bf16(total.w));
    }
    turn ^= 1;
  };
  stream(stages[warp], p.tiles, blocks, blockIdx.x, gridDim.x, p.tiles[0] * blocks, share, open, close);
}

__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) down(const __grid_constant__ Experts p) {
  __shared__ Stage stages[kWarps][kStages];
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int blocks = (p.D + kTileRows - 1) / kTileRows;
  const auto open = [&](int item, int word) {
    const int pair = tile_pair(word, lane / 4), low = item % blocks * kTileRows + lane / 4;
    const bf16* weight = p.down + static_cast<int64_t>(tile_expert(word)) * p.D * p.I;
    return Rows(weight + min(low, p.D - 1) * p.I, weight + min(low + 8, p.D - 1) * p.I,
                p.hidden + max(pair, 0) * p.I, pair >= 0, 0, p.I);
  };
  const auto close = [&](int item, int word, float4 sum) {
    const int first = tile_pair(word, lane % 4 * 2), second = tile_pair(word, lane % 4 * 2 + 1);
    const int low = item % blocks * kTileRows + lane / 4, high = low + 8;
    if (first >= 0 && low < p.D) p.parts[first * p.D + low] = sum.x;
    if (second >= 0 && low < p.D) p.parts[second * p.D + low] = sum.y;
    if (first >= 0 && high < p.D) p.parts[first * p.D + high] = sum.z;
    if (second >= 0 && high < p.D) p.parts[second * p.D + high] = sum.w;
  };
  stream(stages[warp], p.tiles, blocks, blockIdx.x * kWarps + warp, gridDim.x * kWarps, p.tiles[0] * blocks,
         p.I, open, close);
}

struct Combine {
  Group routing;
  const float* parts;   // [T K, D]
  const bf16* weights;  // [T, K]
  bf16* out;            // [T, D]
  int D, K;
  Ahead ahead[2];
};

// A block takes 4 columns a thread of one token.
__global__ void combine(const __grid_constant__ Combine p) {
  fetch_all_ahead(p.ahead, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
  wait_for_previous_grid();
  let_next_grid_start();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, token = blockIdx.y;
  if (column >= p.D) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int k = 0; k < p.K; ++k) {
    const int pair = token * p.K + k;
    if (expert_of(p.routing, pair) < 0) continue;
    const float weight = to_float(p.weights[pair]);
    const float4 part = *reinterpret_cast<const float4*>(p.parts + static_cast<int64_t>(pair) * p.D + column);
    sum = make_float4(sum.x + weight * part.x, sum.y + weight * part.y, sum.z + weight * part.z,
                      sum.w + weight * part.w);
  }
  *reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(token) * p.D + column) =
      make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}

__global__ void __launch_bounds__(kFewChoices* kWarp)
    down_few(const __grid_constant__ Experts p, const __grid_constant__ Combine c) {
  __shared__ float products[kFewChoices][kTileRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first_row = blockIdx.x * kTileRows;
  const int pair = blockIdx.y * p.K + warp, low = first_row + lane / 4;
  // The routing lies there before the wait: gate_up had waited for it when it let this kernel start. So the
  // weights are on their way while gate_up still runs.
  const int expert = expert_of(c.routing, pair);
  const bf16* weight = p.down + static_cast<int64_t>(max(expert, 0)) * p.D * p.I + lane % 4 * 8;
  const bf16* rows[2] = {weight + min(low, p.D - 1) * p.I, weight + min(low + 8, p.D - 1) * p.I};
  const bf16* hidden = p.hidden + pair * p.I + lane % 4 * 8;
  const bool has_token = expert >= 0 && lane / 4 == 0;
  float even[4] = {}, odd[4] = {};
  for (int begin = 0; begin < p.I; begin += kFewChunks * kChunk) {
    uint4 content[2][kFewChunks];
#pragma unroll
    for (int i = 0; i < kFewChunks; ++i) {
      const int column = begin + i * kChunk;
      const bool valid = column + lane % 4 * 8 < p.I;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        content[half][i] = valid ? load_once(rows[half] + column) : make_uint4(0, 0, 0, 0);
    }
    // More registers would keep this block off a multiprocessor that gate_up's blocks are still on.
    for (int column = kFewChunks * kChunk; begin == 0 && lane % 4 == 0 && column < p.I; column += kLine) {
      prefetch_line(rows[0] + column);
      prefetch_line(rows[1] + column);
    }
    wait_for_previous_grid();
#pragma unroll
    for (int i = 0; i < kFewChunks; ++i) {
      const int column = begin + i * kChunk;
      const bool valid = has_token && column + lane % 4 * 8 < p.I;
      const uint4 token =
          valid ? *reinterpret_cast<const uint4*>(hidden + column) : make_uint4(0, 0, 0, 0);
      const uint4 low_row = content[0][i], high_row = content[1][i];
      multiply_add(even, low_row.x, high_row.x, low_row.y, high_row.y, token.x, token.y);
      multiply_add(odd, low_row.z, high_row.z, low_row.w, high_row.w, token.z, token.w);
    }
  }
  let_next_grid_start();
  fetch_all_ahead(c.ahead, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
  if (lane % 4 == 0) {  // the token is column 0
    products[warp][lane / 4] = even[0] + odd[0];
    products[warp][lane / 4 + 8] = even[2] + odd[2];
  }
  __syncthreads();
  const int row = first_row + threadIdx.x;
  if (threadIdx.x >= kTileRows || row >= p.D) return;
  float sum = 0.0f;
  for (int k = 0; k < p.K; ++k) {
    const int at = blockIdx.y * p.K + k;
    if (expert_of(c.routing, at) >= 0) sum += to_float(c.weights[at]) * products[k][threadIdx.x];
  }
  c.out[static_cast<int64_t>(blockIdx.y) * p.D + row] = __float2bfloat16(sum);
}

}  // namespace crossfuse::moe
