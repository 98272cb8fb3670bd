// Attention of one token a sequence over a paged KV cache; lengths are read on the device, and valid pages.
//
// Shapes: B sequences, H query heads, G KV heads, R = H / G <= 8 query heads on one, d head_dim. A tile is 16
// tokens of one KV head, worked on by a warp; four of them go through a block at once. A sequence is cut into
// chunks of whole blocks' worth of tiles, at most kMaxSplits of them; a chunk's length depends on the
// sequence's length alone, so that the sums' order does too.
//
//   attend   a block takes chunks (any sequence, any KV head) until all are done: for each the maximum, the
//            sum of weights and the weighted values
//   combine  one block a head and sequence: the chunks' results in their order, times sigmoid(gate) if there
//            is one
//
// A lane loads 16 bytes of keys to registers, and of values to shared memory that only it reads; the tensor
// cores' layouts are met by permuting head_dim, alike in q and k, and in v and the result.
#pragma once

#include "device.cuh"

namespace crossfuse::paged {

constexpr int kTileTokens = 16, kWarps = 4, kBlockTokens = kTileTokens * kWarps;
constexpr int kMaxSplits = 64, kMaxGroup = 8, kMaxSequences = 1024;
constexpr int kThreads = kWarps * kWarp, kBlocks = 3;  // on a multiprocessor at once
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

__device__ __forceinline__ int64_t index(const Params& p, const void* array, int64_t i) {
  return p.wide ? static_cast<const int64_t*>(array)[i] : static_cast<const int32_t*>(array)[i];
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
    const int chunks = num_chunks(static_cast<int>(index(p, p.lengths, b * p.length_stride))) * p.G;
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

// Two tokens' pairs of neighbouring dims -> one dim's pair of tokens: (a.low, b.low) or (a.high, b.high).
__device__ __forceinline__ uint32_t pair_low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t pair_high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

struct Words {
  uint32_t at[4];
  __device__ __forceinline__ explicit Words(const uint4& x) : at{x.x, x.y, x.z, x.w} {}
};

template <int kDim>
struct Shared {
  bf16 q[kMaxGroup][kDim + 32];  // the padding keeps rows in different banks
  union {
    uint4 content[4][kDim / 64][kWarp];  // 4 tokens a lane
    float values[kMaxGroup][kDim + 8];
  } warps[kWarps];
  float2 sums[kWarps][kMaxGroup];
  int until[kMaxSequences + 1], warp_total[kWarps];
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks) attend(const __grid_constant__ Params p) {
  constexpr int kKeyChunks = kDim / 32, kValueChunks = kDim / 64;
  __shared__ __align__(16) Shared<kDim> shared;
  wait_for_previous_grid();
  let_next_grid_start();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int group = p.H / p.G;
  auto& mine = shared.warps[warp];
  count_chunks(p, shared.until, shared.warp_total);

  for (int item = blockIdx.x; item < shared.until[p.B]; item += gridDim.x) {
    int sequence = 0;
    for (int step = kMaxSequences / 2; step > 0; step /= 2) {
      if (sequence + step < p.B && shared.until[sequence + step] <= item) sequence += step;
    }
    const int length = static_cast<int>(index(p, p.lengths, sequence * p.length_stride)),
              chunk = chunk_tokens(length);
    const int chunks = num_chunks(length), head = (item - shared.until[sequence]) / chunks;
    const int split = (item - shared.until[sequence]) % chunks, end = min((split + 1) * chunk, length);

    const bf16* query = p.q + sequence * p.q_stride + head * group * kDim;
    for (int i = threadIdx.x * 8; i < kMaxGroup * kDim; i += kThreads * 8) {
      const int r = i / kDim;
      *reinterpret_cast<uint4*>(&shared.q[r][i % kDim]) =
          r < group ? *reinterpret_cast<const uint4*>(query + i) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();

    float maximum = kNothing, sum = 0.0f;  // of query head g; the sum over this lane's tokens
    float values[kValueChunks][4][4] = {};
    for (int first = split * chunk + warp * kTileTokens; first < end; first += kBlockTokens) {
      // Lane l < 16 finds where token `first + l` lies; past the end the last one stands in, weighted zero.
      const int token = min(first + lane % kTileTokens, end - 1);
      const int64_t page =
          index(p, p.tables, sequence * p.table_stride + token / p.page_size * p.page_stride) * p.page_size;
      const int64_t place = ((page + token % p.page_size) * p.G + head) * kDim;
      const auto at = [&](int t) { return __shfl_sync(kAllLanes, place, t); };

      const bf16* value[4] = {p.v + at(2 * c) + g * 8, p.v + at(2 * c + 1) + g * 8,
                              p.v + at(2 * c + 8) + g * 8, p.v + at(2 * c + 9) + g * 8};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < kValueChunks; ++i) copy_async(&mine.content[t][i][lane], value[t] + i * 64, true);
      }
      commit_copies();
      uint4 keys[2][kKeyChunks];
      const bf16* key[2] = {p.k + at(g) + c * 8, p.k + at(g + 8) + c * 8};
#pragma unroll
      for (int i = 0; i < kKeyChunks; ++i) {
        keys[0][i] = load_once(key[0] + i * 32);
        keys[1][i] = load_once(key[1] + i * 32);
      }

      // Scores [8 heads x 8 tokens], twice; rows 8 to 15 of the tensor cores' operand are zeros.
      float scores[2][4] = {};
#pragma unroll
      for (int i = 0; i < kKeyChunks; ++i) {
        const uint4 q = *reinterpret_cast<const uint4*>(&shared.q[g][i * 32 + c * 8]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply_add(scores[half], q.x, 0, q.y, 0, keys[half][i].x, keys[half][i].y);
          multiply_add(scores[half], q.z, 0, q.w, 0, keys[half][i].z, keys[half][i].w);
        }
      }
      float weights[4];  // of tokens 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token_at = first + t / 2 * 8 + 2 * c + t % 2;
        weights[t] = token_at < end ? scores[t / 2][t % 2] * p.scale : kNothing;
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
      wait_for_copies<0>();
#pragma unroll
      for (int i = 0; i < kValueChunks; ++i) {
        const Words t0(mine.content[0][i][lane]), t1(mine.content[1][i][lane]);
        const Words t8(mine.content[2][i][lane]), t9(mine.content[3][i][lane]);
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
    }

    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (c == 0) shared.sums[warp][g] = make_float2(maximum, sum);
    __syncwarp();  // all lanes have read their values: the results may take their place
#pragma unroll
    for (int i = 0; i < kValueChunks; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {  // dims 64 i + 8 g + (0 to 7) of head 2c + n
        float4* row = reinterpret_cast<float4*>(&mine.values[2 * c + n][i * 64 + g * 8]);
        row[0] = make_float4(values[i][0][n], values[i][0][n + 2], values[i][1][n], values[i][1][n + 2]);
        row[1] = make_float4(values[i][2][n], values[i][2][n + 2], values[i][3][n], values[i][3][n + 2]);
      }
    }
    __syncthreads();

    const int64_t result = ((static_cast<int64_t>(sequence) * p.G + head) * p.splits + split) * kMaxGroup;
    for (int i = threadIdx.x * 4; i < group * kDim; i += kThreads * 4) {
      const int r = i / kDim;
      float most = shared.sums[0][r].x, total = 0.0f;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) most = fmaxf(most, shared.sums[w][r].x);
      float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(shared.sums[w][r].x - most);
        const float4 part = *reinterpret_cast<const float4*>(&shared.warps[w].values[r][i % kDim]);
        total += weight * shared.sums[w][r].y;
        all = make_float4(all.x + weight * part.x, all.y + weight * part.y, all.z + weight * part.z,
                          all.w + weight * part.w);
      }
      *reinterpret_cast<float4*>(p.values + result * kDim + i) = all;
      if (i % kDim == 0) p.sums[result + r] = make_float2(most, total);
    }
    __syncthreads();  // before the next item writes q and the sums
  }
}

// Four groups of threads take every fourth chunk, 4 dims a thread.
template <int kDim>
__global__ void __launch_bounds__(kDim) combine(const __grid_constant__ Params p) {
  constexpr int kLanes = kDim / 4, kGroups = 4;
  __shared__ float weights[kMaxSplits];
  __shared__ float total;
  __shared__ float4 partial[kGroups][kLanes];
  fetch_all_ahead(p.ahead, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
  wait_for_previous_grid();
  const int head = blockIdx.x, sequence = blockIdx.y, group = p.H / p.G, lane = threadIdx.x % kLanes;
  const int part = threadIdx.x / kLanes;
  const int chunks = num_chunks(static_cast<int>(index(p, p.lengths, sequence * p.length_stride)));
  const int64_t first =
      (static_cast<int64_t>(sequence) * p.G + head / group) * p.splits * kMaxGroup + head % group;
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
#pragma unroll 4
  for (int split = part; split < chunks; split += kGroups) {
    const float weight = weights[split];
    const float4 value =
        *reinterpret_cast<const float4*>(p.values + (first + split * kMaxGroup) * kDim + lane * 4);
    all = make_float4(all.x + weight * value.x, all.y + weight * value.y, all.z + weight * value.z,
                      all.w + weight * value.w);
  }
  partial[part][lane] = all;
  __syncthreads();
  if (part > 0) return;
#pragma unroll
  for (int i = 1; i < kGroups; ++i) {
    const float4 other = partial[i][lane];
    all = make_float4(all.x + other.x, all.y + other.y, all.z + other.z, all.w + other.w);
  }
  const float factor = chunks > 0 ? 1.0f / total : 0.0f;
  float result[4] = {all.x * factor, all.y * factor, all.z * factor, all.w * factor};
  if (p.gate != nullptr) {  // rounded where the plain path rounds
    const bf16* gate = p.gate + sequence * p.gate_stride + head * kDim + lane * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) result[j] = round_bf16(result[j]) * round_bf16(sigmoid(to_float(gate[j])));
  }
  *reinterpret_cast<uint2*>(p.out + (static_cast<int64_t>(sequence) * p.H + head) * kDim + lane * 4) =
      make_uint2(pack_bf16(result[0], result[1]), pack_bf16(result[2], result[3]));
}

}  // namespace crossfuse::paged
