// All-reduce + residual add + RMSNorm of two ranks, for messages so long that the link's rate is what counts.
//
// A block takes a few rows at a time. It writes its own part of them into the peer's memory, and a flag behind it;
// while they travel it does the rows before: waits for the peer's flag, adds both parts, the residual, and norms. So
// the link is busy from the first rows to the last, and sum and norm take no time of their own.
//
// Every call has a number, the same on both ranks. A flag is the number of the call (+ 1) whose rows have arrived. Rows
// of even and odd calls have memory of their own: when a call ends here, the peer has begun it, so the peer's call
// before it has ended, and what that one read may be overwritten. Calls of one rank must follow one another on a stream
// without overlap.
//
// The sum is rounded to bfloat16, then the residual added, as ../contract.py has it; with two parts their order does not
// matter. A row's bits depend on D alone. Without a residual the result is the sum; without `out_normed` there is no norm.
//
// A rank's part may come as the parts of each token's choices (of experts), which are then added here: what `combine` of
// ../jit/moe_prefill.py does, with its bits, while the link is busy. Both ranks' parts come in the same way.
// Shapes: T tokens, D hidden, K choices, N experts.
#pragma once

#include "add_norm.cuh"

namespace crossfuse::pair_allreduce {

using add_norm::kMaxDim, add_norm::kMaxWarps, add_norm::pack, add_norm::unpack;

constexpr int kPlainRows = 4, kChoiceRows = 2;  // of one flag, in plain calls and in calls with choices
constexpr int kUsualDims = 2048;                // up to which a block has 256 threads
constexpr int kMaxChoices = kWarp;

struct State {
  uint32_t calls, blocks;  // calls that have ended; blocks of this one that have
};

struct Params {
  const bf16* partial;     // [T, D], or with experts [T K, D]
  const int32_t* experts;  // [T, K] or null; an id outside 0..N-1: no expert, and its part is not read
  const bf16* residual;    // [T, D] or null
  const bf16* weight;      // [D], and weight_bias is added; null with out_normed
  bf16* out_residual;      // may be residual
  bf16* out_normed;        // or null
  const int64_t* buffers;  // [2]: each rank's `[2, max_tokens, D] rows, then [2, max_tokens / kChoiceRows] flags`
  State* state;
  int rank, T, D, max_tokens, K, N;
  float eps, weight_bias;
};

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// One rank's memory, as this call uses it.
struct Memory {
  bf16* rows;       // [max_tokens, D]
  uint32_t* flags;  // [max_tokens / kChoiceRows]
};

__device__ __forceinline__ Memory memory_of(const Params& p, int rank, uint32_t call) {
  bf16* rows = reinterpret_cast<bf16*>(p.buffers[rank]);
  const int64_t size = static_cast<int64_t>(p.max_tokens) * p.D;
  uint32_t* flags = reinterpret_cast<uint32_t*>(rows + 2 * size);
  const int parity = call % 2;
  return {rows + parity * size, flags + parity * (p.max_tokens / kChoiceRows)};
}

// The sum of a token's parts [K, D], for 8 dims that begin at `part`. `kept` has a bit for each choice that has an expert.
template <int kAtOnce>
__device__ __forceinline__ uint4 sum_of_choices(const bf16* part, uint32_t kept, int K, int D) {
  float total[8] = {};
  for (int first = 0; first < K; first += kAtOnce) {
    uint4 raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool counts = first + i < K && (kept >> (first + i) & 1);
      raw[i] = counts ? load_once(part + static_cast<int64_t>(first + i) * D) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float x[8];
      unpack(x, raw[i]);
#pragma unroll
      for (int k = 0; k < 8; ++k) total[k] += x[k];
    }
  }
  return pack(total);
}

// Three blocks of 256 threads on a multiprocessor have registers for a token's usual 11 choices at once.
template <int kThreads, bool kOfChoices>
__global__ void __launch_bounds__(kThreads, kOfChoices && kThreads * 8 == kUsualDims ? 3 : 1)
    reduce(const __grid_constant__ Params p) {
  constexpr int kRows = kOfChoices ? kChoiceRows : kPlainRows;
  constexpr int kAtOnce = kThreads * 8 == kUsualDims ? 12 : 4;
  __shared__ float squares[kRows][kMaxWarps];
  const int first = threadIdx.x * 8, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp, chunks = (p.T + kRows - 1) / kRows;
  const bool has_dims = first < p.D;
  const uint4 raw_weight =
      has_dims && p.weight ? *reinterpret_cast<const uint4*>(p.weight + first) : make_uint4(0, 0, 0, 0);
  wait_for_previous_grid();
  const uint32_t call = *reinterpret_cast<volatile uint32_t*>(&p.state->calls);
  const Memory mine = memory_of(p, p.rank, call), peers = memory_of(p, 1 - p.rank, call);

  auto place = [&](int chunk, int i) { return (static_cast<int64_t>(chunk) * kRows + i) * p.D + first; };
  auto has_row = [&](int chunk, int i) { return has_dims && chunk * kRows + i < p.T; };

  // Sends this rank's part of a chunk, and leaves it in `part`.
  auto send = [&](int chunk, uint4 (&part)[kRows]) {
    uint32_t kept[kRows];
#pragma unroll
    for (int i = 0; kOfChoices && i < kRows; ++i) {
      const int64_t token = chunk * kRows + i;
      const int expert = token < p.T && lane < p.K ? p.experts[token * p.K + lane] : -1;
      kept[i] = __ballot_sync(kAllLanes, expert >= 0 && expert < p.N);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!has_row(chunk, i)) continue;
      if constexpr (kOfChoices) {
        const int64_t choices = static_cast<int64_t>(chunk * kRows + i) * p.K;
        part[i] = sum_of_choices<kAtOnce>(p.partial + choices * p.D + first, kept[i], p.K, p.D);
      } else {
        part[i] = load_once(p.partial + place(chunk, i));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (has_row(chunk, i)) *reinterpret_cast<uint4*>(peers.rows + place(chunk, i)) = part[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) store_release(peers.flags + chunk, call + 1);
  };

  auto finish = [&](int chunk, const uint4 (&part)[kRows]) {
    uint4 stream[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (p.residual && has_row(chunk, i)) stream[i] = load_once(p.residual + place(chunk, i));
    }
    if (threadIdx.x == 0) {
      while (load_acquire(mine.flags + chunk) != call + 1) {
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float square = 0.0f;
      if (has_row(chunk, i)) {
        float own[8], other[8], x[8];
        unpack(own, part[i]);
        unpack(other, load_once(mine.rows + place(chunk, i)));
        unpack(x, stream[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float sum = round_bf16(own[k] + other[k]);
          x[k] = p.residual ? round_bf16(x[k] + sum) : sum;
          square += x[k] * x[k];
        }
        stream[i] = pack(x);
        *reinterpret_cast<uint4*>(p.out_residual + place(chunk, i)) = stream[i];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(kAllLanes, square, step);
      if (lane == 0) squares[i][warp] = square;
    }
    if (!p.out_normed) return;
    __syncthreads();
    float weight[8];
    unpack(weight, raw_weight);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float total = lane < warps ? squares[i][lane] : 0.0f;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (!has_row(chunk, i)) continue;
      const float factor = rsqrtf(total / p.D + p.eps);
      float x[8];
      unpack(x, stream[i]);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = x[k] * factor * (p.weight_bias + weight[k]);
      *reinterpret_cast<uint4*>(p.out_normed + place(chunk, i)) = pack(x);
    }
  };

  int chunk = blockIdx.x;
  uint4 part[kRows];
  if (chunk < chunks) send(chunk, part);
  for (; chunk < chunks; chunk += gridDim.x) {
    uint4 next[kRows];
    if (chunk + gridDim.x < chunks) send(chunk + gridDim.x, next);
    finish(chunk, part);
#pragma unroll
    for (int i = 0; i < kRows; ++i) part[i] = next[i];
  }

  if (threadIdx.x == 0 && atomicAdd(&p.state->blocks, 1) == gridDim.x - 1) {
    p.state->blocks = 0;
    p.state->calls = call + 1;  // the next kernel on the stream sees it
  }
}

}  // namespace crossfuse::pair_allreduce
