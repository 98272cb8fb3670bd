// Gated DeltaNet for sequences of one token each: causal convolution, gates, gated delta rule and gated norm
// in one kernel. What it computes, and where it rounds, is `gdn_decode_plain` in ../gdn_decode.py.
//
// Shapes: B sequences, H key heads, HV value heads, dk, dv head dims, C = 2 H dk + HV dv channels, K = 4
// taps. A state [dk, dv] is read and written once, in float32, and its columns are independent but for the
// norm:
//
//   unit     128 threads: 32 columns of the state of one value head; thread (row lane, column lane) holds 4
//            columns of every 16th row in registers
//   block    1, 2 or 4 units
//   cluster  all units of the HV / H value heads that share a key head. They need the same convolved q and k,
//            which each block computes for itself; old inputs are overwritten when all have read them, and
//            the norm needs the squares of a whole head: a mailbox in each block's shared memory waits for
//            both.
//
// A sum's order depends on none of B, the block or the cluster.
#pragma once

#include "device.cuh"

namespace crossfuse::gdn {

constexpr int kUnitThreads = 128, kUnitColumns = 32, kRowLanes = 16;
constexpr int kMaxUnits = 4;          // of a block
constexpr int kUnitsResident = 6;     // on a multiprocessor at once (five are as fast)
constexpr int kMaxClusterUnits = 32;  // of a cluster of 8 blocks
constexpr int kMaxKeyDim = 128, kMaxValueDim = 256, kTaps = 4;
constexpr float kL2Eps = 1e-6f;

struct Params {
  const bf16* projected;  // [B, C + HV dv + 2 HV]: q, k, v, z, b, a
  int64_t projected_stride;
  bf16* conv;         // [slots + 1, C, K - 1], oldest first
  float* state;       // [slots + 1, HV, dk, dv]
  const void* slots;  // [B]; a row of slot 0 or less is padding: it starts from nothing and leaves nothing
  bool wide_slots;    // int64, not int32
  int64_t slots_stride;
  const bf16* conv_weight;  // [C, K]
  const float* a_log;       // [HV]
  const float* dt_bias;     // [HV]
  const bf16* norm_weight;  // [dv]
  bf16* out;                // [B, HV dv]
  int H, HV, dk, dv;
  float eps;
  Ahead ahead[2];
};

struct Shared {
  float q[kMaxKeyDim], k[kMaxKeyDim];        // normalised; q scaled
  bf16 inputs[2][kMaxKeyDim * (kTaps - 1)];  // the new convolution states of q and k
  float v[kMaxUnits][kUnitColumns], gate[kMaxUnits][kUnitColumns], norm_weight[kMaxUnits][kUnitColumns];
  float decay[kMaxUnits], beta[kMaxUnits];
  float dots[kMaxUnits][4][2][kUnitColumns];  // k^T S and q^T S, by warp
  float qk[4];
  float squares[kMaxClusterUnits];  // of each unit's outputs, sent by all blocks of the cluster
  uint64_t mailbox;                 // for the squares
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// One channel of the convolution. Loading has no branches: several channels' loads are under way at once.
struct Channel {
  bf16 window[kTaps];  // the last is the new input
  uint2 weight;

  __device__ __forceinline__ void load(const Params& p, int64_t row, int64_t slot, int channel) {
    const int channels = 2 * p.H * p.dk + p.HV * p.dv;
    const bf16* old = p.conv + ((slot > 0 ? slot : 0) * channels + channel) * (kTaps - 1);
    weight = *reinterpret_cast<const uint2*>(p.conv_weight + channel * kTaps);
#pragma unroll
    for (int t = 0; t < kTaps - 1; ++t) window[t] = old[t];
    window[kTaps - 1] = p.projected[row * p.projected_stride + channel];
  }

  // silu(conv), rounded as the plain path does.
  __device__ __forceinline__ float value(bool live) const {
    float old = to_float(window[0]) * low_bf16(weight.x) + to_float(window[1]) * high_bf16(weight.x) +
                to_float(window[2]) * low_bf16(weight.y);
    old = live ? old : 0.0f;
    return round_bf16(silu(round_bf16(old + to_float(window[3]) * high_bf16(weight.y))));
  }

  __device__ __forceinline__ void store_state(bf16* state) const {
#pragma unroll
    for (int t = 1; t < kTaps; ++t) state[t - 1] = window[t];
  }
};

// One warp: the dk channels of q or k of one head, convolved, l2-normalised and scaled.
template <int kRows>
__device__ __forceinline__ void prepare_key(const Params& p, int64_t row, int64_t slot, int first_channel,
                                            float scale, float* normed, bf16* inputs) {
  constexpr int kChannels = (kRows * kRowLanes + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  Channel channel[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    channel[i].load(p, row, slot, first_channel + min(lane + i * kWarp, p.dk - 1));
  float value[kChannels], square = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int c = lane + i * kWarp;
    value[i] = c < p.dk ? channel[i].value(slot > 0) : 0.0f;
    square += value[i] * value[i];
    if (c < p.dk) channel[i].store_state(inputs + c * (kTaps - 1));
  }
  const float factor = rsqrtf(warp_sum(square) + kL2Eps) * scale;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int c = lane + i * kWarp;
    if (c < p.dk) normed[c] = value[i] * factor;
  }
}

// One unit's state, decayed: k^T S and q^T S of 4 columns over a warp's rows, and that warp's part of q^T k. q reads
// the new state S + k c^T as q^T S + (q^T k) c^T, so one pass over S will do. (A function of its own: written out in
// the kernel, it made the compiler spill registers.)
template <int kRows>
__device__ __forceinline__ void read_state(float4 (&s)[kRows], float decay, const float* k, const float* q,
                                           int first_row, int dk, float (&with_k)[4], float (&with_q)[4],
                                           float& qk) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = first_row + i * kRowLanes;
    const float key = r < dk ? k[r] : 0.0f, query = r < dk ? q[r] : 0.0f;
    s[i] = make_float4(s[i].x * decay, s[i].y * decay, s[i].z * decay, s[i].w * decay);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      with_k[j] += key * quarter(s[i], j);
      with_q[j] += query * quarter(s[i], j);
    }
    qk += query * key;
  }
#pragma unroll
  for (int step = 8; step < kWarp; step *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      with_k[j] += __shfl_xor_sync(kAllLanes, with_k[j], step);
      with_q[j] += __shfl_xor_sync(kAllLanes, with_q[j], step);
    }
    qk += __shfl_xor_sync(kAllLanes, qk, step);
  }
}

// S + k c^T, to where this thread's columns of the state lie.
template <int kRows>
__device__ __forceinline__ void write_state(const float4 (&s)[kRows], const float (&correction)[4],
                                            const float* k, int first_row, const Params& p, float* state) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = first_row + i * kRowLanes;
    if (r < p.dk) {
      const float key = k[r];
      __stcs(reinterpret_cast<float4*>(state + r * p.dv),
             make_float4(s[i].x + key * correction[0], s[i].y + key * correction[1],
                         s[i].z + key * correction[2], s[i].w + key * correction[3]));
    }
  }
}

// kRows of the state in one thread, dk <= 16 kRows; kUnits in a block.
template <int kRows, int kUnits>
__global__ void __launch_bounds__(kUnits* kUnitThreads, kUnitsResident / kUnits)
    decode(const __grid_constant__ Params p) {
  __shared__ __align__(16) Shared shared;
  const int group = p.HV / p.H, blocks = (p.dv + kUnitColumns - 1) / kUnitColumns;
  if (threadIdx.x == 0) make_mailbox(&shared.mailbox, group * blocks * sizeof(float));
  __syncwarp();
  cluster_arrive();

  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp % 4, unit = threadIdx.x / kUnitThreads;
  const int rank = cluster_rank();
  const int cluster_unit = rank * (blockDim.x / kUnitThreads) + unit;
  const bool has_unit = cluster_unit < group * blocks;
  const int key_head = blockIdx.x / cluster_size(),
            head = key_head * group + (has_unit ? cluster_unit / blocks : 0);
  const int first_column = has_unit ? cluster_unit % blocks * kUnitColumns : 0;
  const int column = first_column + lane % 8 * 4, first_row = part * 4 + lane / 8;
  const bool has_column = has_unit && column < p.dv;
  const int key_channels = p.H * p.dk, channels = 2 * key_channels + p.HV * p.dv;
  const int64_t row = blockIdx.y;
  const int64_t slot = p.wide_slots ? static_cast<const int64_t*>(p.slots)[row * p.slots_stride]
                                    : static_cast<const int32_t*>(p.slots)[row * p.slots_stride];
  const bool live = slot > 0;

  // The state is on its way while the previous kernel ends and the convolution is computed. It was written a
  // step ago, and the kernel before this one started after all that went before it.
  float* state = p.state + ((live ? slot : 0) * p.HV + head) * p.dk * p.dv + column;
  float4 s[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = first_row + i * kRowLanes;
    s[i] = live && has_column && r < p.dk ? as_floats(load_once(state + r * p.dv)) : float4{};
  }

  fetch_all_ahead(p.ahead, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
  wait_for_previous_grid();
  let_next_grid_start();

  const bf16* projected = p.projected + row * p.projected_stride;
  if (unit == 0 && part < 2) {
    const float scale = part == 0 ? 1.0f / sqrtf(static_cast<float>(p.dk)) : 1.0f;
    prepare_key<kRows>(p, row, slot, part * key_channels + key_head * p.dk, scale,
                       part == 0 ? shared.q : shared.k, shared.inputs[part]);
  } else if (part == 2) {
    const int c = min(first_column + lane, p.dv - 1), channel = 2 * key_channels + head * p.dv + c;
    Channel value;
    value.load(p, row, slot, channel);
    shared.v[unit][lane] = value.value(live);
    if (live && has_unit && first_column + lane < p.dv) {
      value.store_state(p.conv + (slot * channels + channel) * (kTaps - 1));
    }
  } else if (part == 3) {
    const int c = min(first_column + lane, p.dv - 1);
    const bf16* gates = projected + channels + p.HV * p.dv;  // b, then a
    const float z = to_float(projected[channels + head * p.dv + c]), weight = to_float(p.norm_weight[c]);
    const float b = to_float(gates[head]), x = to_float(gates[p.HV + head]) + p.dt_bias[head];
    const float softplus = x > 20.0f ? x : log1pf(expf(x));
    shared.decay[unit] = expf(-expf(p.a_log[head]) * softplus);
    shared.beta[unit] = round_bf16(sigmoid(b));
    shared.gate[unit][lane] = silu(z);
    shared.norm_weight[unit][lane] = weight;
  }
  __syncthreads();

  const float decay = shared.decay[unit];
  float with_k[4] = {}, with_q[4] = {}, qk = 0.0f;
  read_state(s, decay, shared.k, shared.q, first_row, p.dk, with_k, with_q, qk);
  if (lane < 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      shared.dots[unit][part][0][lane * 4 + j] = with_k[j];
      shared.dots[unit][part][1][lane * 4 + j] = with_q[j];
    }
    if (unit == 0 && lane == 0) shared.qk[part] = qk;
  }
  __syncthreads();

  float correction[4], output[4];
  const float all_qk = shared.qk[0] + shared.qk[1] + shared.qk[2] + shared.qk[3];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = lane % 8 * 4 + j;
    float expected = 0.0f, read = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      expected += shared.dots[unit][w][0][c];
      read += shared.dots[unit][w][1][c];
    }
    correction[j] = has_column ? (shared.v[unit][c] - expected) * shared.beta[unit] : 0.0f;
    output[j] = has_column ? round_bf16(read + all_qk * correction[j]) : 0.0f;
  }

  float square =
      output[0] * output[0] + output[1] * output[1] + output[2] * output[2] + output[3] * output[3];
#pragma unroll
  for (int step = 1; step < 8; step *= 2) square += __shfl_xor_sync(kAllLanes, square, step);
  cluster_wait();
  if (has_unit && part == 0 && lane < cluster_size()) {
    send(&shared.squares[cluster_unit], &shared.mailbox, lane, square);
  }

  if (live && has_column) {
    write_state(s, correction, shared.k, first_row, p, state);
  }
  receive(&shared.mailbox);  // all blocks have read the old inputs by now

  if (live && rank == 0 && unit == 0 && part < 2) {
    const int64_t first = slot * channels + part * key_channels + key_head * p.dk;
    uint4* conv = reinterpret_cast<uint4*>(p.conv + first * (kTaps - 1));
    const uint4* inputs = reinterpret_cast<const uint4*>(shared.inputs[part]);
#pragma unroll 1
    for (int i = lane; i < p.dk * (kTaps - 1) / 8; i += kWarp) conv[i] = inputs[i];
  }
  if (has_column && part == 0 && lane < 8) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) sum += shared.squares[cluster_unit / blocks * blocks + i];
    const float factor = rsqrtf(sum / p.dv + p.eps);
    float gated[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = lane * 4 + j;
      gated[j] =
          round_bf16(shared.norm_weight[unit][c] * round_bf16(output[j] * factor)) * shared.gate[unit][c];
    }
    *reinterpret_cast<uint2*>(p.out + (row * p.HV + head) * p.dv + column) =
        make_uint2(pack_bf16(gated[0], gated[1]), pack_bf16(gated[2], gated[3]));
  }
}

}  // namespace crossfuse::gdn
