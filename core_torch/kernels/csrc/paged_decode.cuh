// Attention of one token a sequence over a paged KV cache; lengths are read on the device, and valid pages.
//
// Shapes: B sequences, H query heads, G KV heads, R = H / G <= 8 query heads on one, d head_dim. A tile is 16
// tokens of one KV head, worked on by a warp; the four warps of a block take tiles in turn. A sequence is cut
// into chunks of whole blocks' worth of tiles, at most kMaxSplits of them; a chunk's length depends on the
// sequence's length alone, so that the sums' order does too.
//
//   attend   a block takes chunks (any sequence, any KV head) until all are done: for each the maximum, the
//            sum of weights and the weighted values
//   combine  one block a head and sequence: the chunks' results in their order, times sigmoid(gate) if there
//            is one
//
// A warp's tiles, through all chunks of its block, are one stream: as soon as a tile's keys, or values, are
// used, those of the next tile are on their way to their place in shared memory, and stay so while
// the block puts a chunk's results together. A lane reads only what it copied itself, so a tile needs no
// barrier; the tensor cores' layouts are met by permuting head_dim, alike in q and k, and in v and the result.
//
// Lengths and page tables are read before the previous kernel ends: it must not be what writes them.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace crossfuse::paged {

constexpr int kTileTokens = 16, kWarps = 4, kBlockTokens = kTileTokens * kWarps;
constexpr int kMaxSplits = 64, kMaxGroup = 8, kMaxSequences = 1024;
constexpr int kThreads = kWarps * kWarp, kMaxBlocks = 4;  // on a multiprocessor at once
constexpr int kSharedBytes = 227 << 10, kReservedBytes = 1 << 10;  // of a multiprocessor, of each block
constexpr float kNothing = -INFINITY;

struct Params {
  const bf16* q;  // [B, H, d]
  const bf16* k;  // [pages, page_size, G, d]
  const bf16* v;
  const void* tables;   // [B, P]
  const void* lengths;  // [B]; a row of length 0 has no result but zeros
  bool wide;            // int64, not int32
  int64_t q_stride, table_stride, page_stride, length_stride;
  float* values;     // [B, G, kMaxSplits or fewer, 8, d], not divided by the sums
  float2* sums;      // [B, G, splits, 8]: maximum (of scores in powers of two) and sum of weights
  bf16* out;         // [B, H, d]
  const bf16* gate;  // [B, H d] or null
  int64_t gate_stride;
  int B, H, G, page_size, splits;
  float scale;  // times log2(e)
  Ahead ahead[2];
};

// Lengths and page numbers fit 32 bits: an int64's first half, so that no arithmetic waits for what is loaded.
__device__ __forceinline__ int index(const Params& p, const void* array, int64_t i) {
  return static_cast<const int32_t*>(array)[p.wide ? 2 * i : i];
}

__device__ __forceinline__ int chunk_tokens(int length) {
  const int blocks = (length + kBlockTokens - 1) / kBlockTokens;
  return (blocks + kMaxSplits - 1) / kMaxSplits * kBlockTokens;
}

__device__ __forceinline__ int num_chunks(int length) {
  return length <= 0 ? 0 : (length + chunk_tokens(length) - 1) / chunk_tokens(length);
}

// until[b] = the chunks of sequences 0..b-1, over all KV heads; by the whole block.
__device__ __forceinline__ void count_chunks(const Params& p, int (&until)[kMaxSequences + 1],
                                             int (&warp_total)[kWarps]) {
  const int each = (p.B + kThreads - 1) / kThreads, first = threadIdx.x * each;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int mine = 0;
  for (int b = first; b < min(first + each, p.B); ++b) {
    const int chunks = num_chunks(index(p, p.lengths, b * p.length_stride)) * p.G;
    until[b + 1] = chunks;
    mine += chunks;
  }
  int before = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  if (lane == kWarp - 1) warp_total[warp] = before;
  if (threadIdx.x == 0) until[0] = 0;
  __syncthreads();
  before -= mine;
  for (int w = 0; w < warp; ++w) before += warp_total[w];
  for (int b = first; b < min(first + each, p.B); ++b) {
    before += until[b + 1];
    until[b + 1] = before;
  }
  __syncthreads();
}

// What a block does at a time: one chunk of one sequence, for one KV head.
struct Item {
  int sequence, head, split, begin, end;
};

__device__ __forceinline__ Item find_item(const Params& p, const int (&until)[kMaxSequences + 1], int item) {
  int sequence = 0;
  for (int step = kMaxSequences / 2; step > 0; step /= 2) {
    if (sequence + step < p.B && until[sequence + step] <= item) sequence += step;
  }
  const int length = index(p, p.lengths, sequence * p.length_stride), chunk = chunk_tokens(length);
  const int chunks = num_chunks(length), head = (item - until[sequence]) / chunks;
  const int split = item - until[sequence] - head * chunks;
  return {sequence, head, split, split * chunk, min((split + 1) * chunk, length)};
}

// Two tokens' pairs of neighbouring dims -> one dim's pair of tokens: (a.low, b.low) or (a.high, b.high).
__device__ __forceinline__ uint32_t pair_low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t pair_high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

struct Words {
  uint32_t at[4];
  __device__ __forceinline__ explicit Words(const uint4& x) : at{x.x, x.y, x.z, x.w} {}
};

template <int kDim>
struct Shared {
  struct {
    uint4 keys[2][kDim / 32][kWarp];     // 2 tokens a lane
    uint4 values[4][kDim / 64][kWarp];   // 4 tokens a lane
    float results[kMaxGroup][kDim + 8];  // the padding keeps rows in different banks
  } warps[kWarps];
  float2 sums[kWarps][kMaxGroup];
  int until[kMaxSequences + 1], warp_total[kWarps];

  static constexpr int resident() {
    return std::min<int>(kMaxBlocks, kSharedBytes / (sizeof(Shared) + kReservedBytes));
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, Shared<kDim>::resident()) attend(const __grid_constant__ Params p) {
  constexpr int kKeyChunks = kDim / 32, kValueChunks = kDim / 64;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int group = p.H / p.G;
  auto& mine = shared.warps[warp];
  count_chunks(p, shared.until, shared.warp_total);
  const int items = shared.until[p.B];

  // Where a tile lies. Lane l < 16 looks up token l; past the end the last one stands in, weighted zero. What
  // the table says is only needed when the tile is fetched, long after it was asked for.
  struct Tile {
    int head, page, place;  // head < 0: there are no more tiles
  };
  struct {
    int item, first;
    Item in;
  } next{static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x), 0, {}};
  const auto next_tile = [&]() -> Tile {
    while (next.first >= next.in.end) {  // a short chunk may have no tile for this warp
      next.item += gridDim.x;
      if (next.item >= items) return {-1, 0, 0};
      next.in = find_item(p, shared.until, next.item);
      next.first = next.in.begin + warp * kTileTokens;
    }
    const int token = min(next.first + lane % kTileTokens, next.in.end - 1);
    next.first += kBlockTokens;
    const int64_t row = next.in.sequence * p.table_stride;
    return {next.in.head, index(p, p.tables, row + token / p.page_size * p.page_stride), token % p.page_size};
  };
  const auto place_of = [&](const Tile& tile) {
    return ((static_cast<int64_t>(tile.page) * p.page_size + tile.place) * p.G + tile.head) * kDim;
  };
  // Each of the two ends a group of copies, of none if there is no tile.
  const auto fetch_keys = [&](const Tile& tile) {
    if (tile.head >= 0) {
      const int64_t place = place_of(tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bf16* key = p.k + __shfl_sync(kAllLanes, place, g + 8 * half) + c * 8;
#pragma unroll
        for (int i = 0; i < kKeyChunks; ++i) {
          copy_async(&mine.keys[half][i][lane], key + i * 32, true);
        }
      }
    }
    commit_copies();
  };
  const auto fetch_values = [&](const Tile& tile) {
    if (tile.head >= 0) {
      const int64_t place = place_of(tile);
#pragma unroll
      for (int t = 0; t < 4; ++t) {  // tokens 2c, 2c + 1, 2c + 8, 2c + 9
        const bf16* value = p.v + __shfl_sync(kAllLanes, place, 2 * c + t % 2 + t / 2 * 8) + g * 8;
#pragma unroll
        for (int i = 0; i < kValueChunks; ++i) {
          copy_async(&mine.values[t][i][lane], value + i * 64, true);
        }
      }
    }
    commit_copies();
  };

  Tile ahead = next_tile();
  wait_for_previous_grid();
  let_next_grid_start();
  fetch_keys(ahead);
  fetch_values(ahead);
  ahead = next_tile();

  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Item in = find_item(p, shared.until, item);
    const bf16* query = p.q + in.sequence * p.q_stride + (in.head * group + g) * kDim + c * 8;
    uint4 q[kKeyChunks];
#pragma unroll
    for (int i = 0; i < kKeyChunks; ++i) {
      q[i] = g < group ? *reinterpret_cast<const uint4*>(query + i * 32) : make_uint4(0, 0, 0, 0);
    }

    float maximum = kNothing, sum = 0.0f;  // of query head g; the sum over this lane's tokens
    float values[kValueChunks][4][4] = {};
    for (int first = in.begin + warp * kTileTokens; first < in.end; first += kBlockTokens) {
      // Scores [8 heads x 8 tokens], twice, each in two parts, for a shorter chain of sums; rows 8 to 15 of the
      // tensor cores' operand are zeros.
      float scores[2][2][4] = {};
      wait_for_copies<1>();  // for all but the values behind the keys
#pragma unroll
      for (int i = 0; i < kKeyChunks; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 key = mine.keys[half][i][lane];
          multiply_add(scores[half][0], q[i].x, 0, q[i].y, 0, key.x, key.y);
          multiply_add(scores[half][1], q[i].z, 0, q[i].w, 0, key.z, key.w);
        }
      }
      fetch_keys(ahead);
      float weights[4];  // of tokens 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = first + t / 2 * 8 + 2 * c + t % 2;
        weights[t] = token < in.end ? (scores[t / 2][0][t % 2] + scores[t / 2][1][t % 2]) * p.scale : kNothing;
      }
      float most = fmaxf(fmaxf(weights[0], weights[1]), fmaxf(weights[2], weights[3]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(maximum, fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)));
      const float shrink = exp2f(maximum - most);
      maximum = most;
      sum *= shrink;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        weights[t] = exp2f(weights[t] - maximum);
        sum += weights[t];
      }

      // Values [16 dims x 8 heads] a product: its columns are heads 2c and 2c + 1 in this lane.
      const float shrink_first = __shfl_sync(kAllLanes, shrink, 8 * c),
                  shrink_second = __shfl_sync(kAllLanes, shrink, 8 * c + 4);
      const uint32_t low = pack_bf16(weights[0], weights[1]), high = pack_bf16(weights[2], weights[3]);
      wait_for_copies<1>();  // for all but the next keys behind the values
#pragma unroll
      for (int i = 0; i < kValueChunks; ++i) {
        const Words t0(mine.values[0][i][lane]), t1(mine.values[1][i][lane]);
        const Words t8(mine.values[2][i][lane]), t9(mine.values[3][i][lane]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[i][j][0] *= shrink_first;
          values[i][j][1] *= shrink_second;
          values[i][j][2] *= shrink_first;
          values[i][j][3] *= shrink_second;
          multiply_add(values[i][j], pair_low(t0.at[j], t1.at[j]), pair_high(t0.at[j], t1.at[j]),
                       pair_low(t8.at[j], t9.at[j]), pair_high(t8.at[j], t9.at[j]), low, high);
        }
      }
      fetch_values(ahead);
      ahead = next_tile();
    }

    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    __syncthreads();  // all have read the last item's results
    if (c == 0) shared.sums[warp][g] = make_float2(maximum, sum);
#pragma unroll
    for (int i = 0; i < kValueChunks; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {  // dims 64 i + 8 g + (0 to 7) of head 2c + n
        float4* row = reinterpret_cast<float4*>(&mine.results[2 * c + n][i * 64 + g * 8]);
        row[0] = make_float4(values[i][0][n], values[i][0][n + 2], values[i][1][n], values[i][1][n + 2]);
        row[1] = make_float4(values[i][2][n], values[i][2][n + 2], values[i][3][n], values[i][3][n + 2]);
      }
    }
    __syncthreads();

    const int64_t result =
        ((static_cast<int64_t>(in.sequence) * p.G + in.head) * p.splits + in.split) * kMaxGroup;
    for (int i = threadIdx.x * 4; i < group * kDim; i += kThreads * 4) {
      const int r = i / kDim;
      float most = shared.sums[0][r].x, total = 0.0f;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) most = fmaxf(most, shared.sums[w][r].x);
      float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(shared.sums[w][r].x - most);
        const float4 part = *reinterpret_cast<const float4*>(&shared.warps[w].results[r][i % kDim]);
        total += weight * shared.sums[w][r].y;
        all = make_float4(all.x + weight * part.x, all.y + weight * part.y, all.z + weight * part.z,
                          all.w + weight * part.w);
      }
      __stcg(reinterpret_cast<float4*>(p.values + result * kDim + i), all);
      if (i % kDim == 0) p.sums[result + r] = make_float2(most, total);
    }
  }
}

// Four groups of threads take every fourth chunk, 4 dims a thread. After the previous kernel's end it waits for
// memory once, unless there are more chunks than its threads load at a time.
template <int kDim>
__global__ void __launch_bounds__(kDim) combine(const __grid_constant__ Params p) {
  constexpr int kLanes = kDim / 4, kGroups = 4, kAtOnce = 8;
  __shared__ float weights[kMaxSplits];
  __shared__ float total;
  __shared__ float4 partial[kGroups][kLanes];
  fetch_all_ahead(p.ahead, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
  const int head = blockIdx.x, sequence = blockIdx.y, group = p.H / p.G, lane = threadIdx.x % kLanes;
  const int part = threadIdx.x / kLanes;
  // `attend` let this kernel start after it had waited itself, so lengths and gate were written long ago.
  const int chunks = num_chunks(index(p, p.lengths, sequence * p.length_stride));
  const int64_t first =
      (static_cast<int64_t>(sequence) * p.G + head / group) * p.splits * kMaxGroup + head % group;
  const float4* values = reinterpret_cast<const float4*>(p.values + first * kDim + lane * 4);
  constexpr int kStep = kMaxGroup * kDim / 4;  // from one chunk's to the next one's
  bf16 gate[4] = {};
  if (p.gate != nullptr && part == 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j) gate[j] = p.gate[sequence * p.gate_stride + head * kDim + lane * 4 + j];
  }
  wait_for_previous_grid();
  let_next_grid_start();

  float4 loaded[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int split = part + i * kGroups;
    loaded[i] = split < chunks ? __ldcg(values + split * kStep) : float4{};
  }
  if (threadIdx.x < kWarp) {
    float2 sums[kMaxSplits / kWarp];
    float most = kNothing, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const int split = threadIdx.x + i * kWarp;
      sums[i] = split < chunks ? p.sums[first + split * kMaxGroup] : make_float2(kNothing, 0.0f);
      most = fmaxf(most, sums[i].x);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarp; ++i) {
      const float weight = chunks > 0 ? exp2f(sums[i].x - most) : 0.0f;
      weights[threadIdx.x + i * kWarp] = weight;
      sum += weight * sums[i].y;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (threadIdx.x == 0) total = sum;
  }
  __syncthreads();
  float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const auto add = [&](float weight, const float4& value) {
    all = make_float4(all.x + weight * value.x, all.y + weight * value.y, all.z + weight * value.z,
                      all.w + weight * value.w);
  };
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) add(weights[part + i * kGroups], loaded[i]);
#pragma unroll 8
  for (int split = part + kAtOnce * kGroups; split < chunks; split += kGroups) {
    add(weights[split], __ldcg(values + split * kStep));
  }
  partial[part][lane] = all;
  __syncthreads();
  if (part > 0) return;
#pragma unroll
  for (int i = 1; i < kGroups; ++i) add(1.0f, partial[i][lane]);
  const float factor = chunks > 0 ? 1.0f / total : 0.0f;
  float result[4] = {all.x * factor, all.y * factor, all.z * factor, all.w * factor};
  if (p.gate != nullptr) {  // rounded where the plain path rounds
#pragma unroll
    for (int j = 0; j < 4; ++j) result[j] = round_bf16(result[j]) * round_bf16(sigmoid(to_float(gate[j])));
  }
  *reinterpret_cast<uint2*>(p.out + (static_cast<int64_t>(sequence) * p.H + head) * kDim + lane * 4) =
      make_uint2(pack_bf16(result[0], result[1]), pack_bf16(result[2], result[3]));
}

}  // namespace crossfuse::paged
