// A linear layer for few tokens: its weights stream from memory once, all of a block's at the same time.
//
// Shapes: T tokens, I inputs, O outputs. A block takes 16 outputs, the 16-row operand of the tensor cores; its
// 8 warps share the sum over I; 8 tokens at a time are the columns. A lane reads only the weights that it
// copied itself. They are constants, so they are on their way before the previous kernel ends.
//
// A token's sums have one order whatever else is in the batch.
#pragma once

#include "device.cuh"

namespace crossfuse::few_rows {

constexpr int kTileRows = 16, kTileTokens = 8, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kMaxRows = 32;  // tokens
constexpr int kChunk = 32;    // columns that a warp copies with one instruction a row
constexpr int kChunks = 8;    // that a warp has in shared memory: 64 KiB a block
constexpr int kBlocks = 3;    // on a multiprocessor at once

struct Params {
  const bf16* x;       // [T, I]
  const bf16* weight;  // [O, I]
  bf16* out;           // [T, O]
  int64_t x_stride;
  int T, O, I;
};

struct Content {
  uint4 rows[kWarps][kChunks][2][kWarp];
};

// Adds the product of the warp's weights in shared memory, columns `begin` to `end`, with a tile's tokens.
__device__ __forceinline__ void multiply(const Params& p, const uint4 (&rows)[kChunks][2][kWarp], int token,
                                         int begin, int end, float (&even)[4], float (&odd)[4]) {
  const int lane = threadIdx.x % kWarp, column = begin + lane % 4 * 8;
  const bf16* x = p.x + min(token, p.T - 1) * p.x_stride;
  uint4 tokens[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const bool valid = token < p.T && column + i * kChunk < end;
    tokens[i] = valid ? *reinterpret_cast<const uint4*>(x + column + i * kChunk) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint4 low = rows[i][0][lane], high = rows[i][1][lane];
    multiply_add(even, low.x, high.x, low.y, high.y, tokens[i].x, tokens[i].y);
    multiply_add(odd, low.z, high.z, low.w, high.w, tokens[i].z, tokens[i].w);
  }
}

// kTiles tiles of tokens.
template <int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocks) product(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float4 sums[2][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first_row = blockIdx.x * kTileRows;
  auto& rows = reinterpret_cast<Content*>(memory)->rows[warp];
  const int share = (p.I + kWarps * kChunk - 1) / (kWarps * kChunk) * kChunk;  // of the sum over I
  const int first = min(warp * share, p.I), end = min(first + share, p.I);
  const int low = first_row + lane / 4;
  const bf16* weights[2] = {p.weight + static_cast<int64_t>(min(low, p.O - 1)) * p.I,
                            p.weight + static_cast<int64_t>(min(low + 8, p.O - 1)) * p.I};

  float even[kTiles][4] = {}, odd[kTiles][4] = {};
  for (int begin = first; begin < end; begin += kChunks * kChunk) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = begin + i * kChunk + lane % 4 * 8;
      const bool valid = column < end;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        copy_async(&rows[i][half][lane], weights[half] + (valid ? column : 0), valid);
    }
    commit_copies();
    wait_for_previous_grid();
    let_next_grid_start();
    wait_for_copies<0>();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * kTileTokens < p.T)
        multiply(p, rows, tile * kTileTokens + lane / 4, begin, end, even[tile], odd[tile]);
    }
  }
  wait_for_previous_grid();

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * kTileTokens >= p.T) break;
    float4(&mine)[kWarps][kWarp] = sums[tile % 2];  // two take turns, so one barrier a tile is enough
    mine[warp][lane] = make_float4(even[tile][0] + odd[tile][0], even[tile][1] + odd[tile][1],
                                   even[tile][2] + odd[tile][2], even[tile][3] + odd[tile][3]);
    __syncthreads();
    if (warp > 0) continue;
    float4 total = mine[0][lane];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float4 other = mine[w][lane];
      total = make_float4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
    }
    // Rows l / 4 and l / 4 + 8 of tokens 2 (l % 4) and 2 (l % 4) + 1.
    const int token = tile * kTileTokens + lane % 4 * 2, high = low + 8;
    bf16* out = p.out + static_cast<int64_t>(token) * p.O;
    if (token < p.T && low < p.O) out[low] = __float2bfloat16(total.x);
    if (token + 1 < p.T && low < p.O) out[p.O + low] = __float2bfloat16(total.y);
    if (token < p.T && high < p.O) out[high] = __float2bfloat16(total.z);
    if (token + 1 < p.T && high < p.O) out[p.O + high] = __float2bfloat16(total.w);
  }
}

}  // namespace crossfuse::few_rows
