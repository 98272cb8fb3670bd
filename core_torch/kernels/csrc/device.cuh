// Small device functions that the kernels share: bfloat16 pairs, loads, tensor-core products, clusters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace crossfuse {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16(x)); }

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two bfloat16 in one register, `low` in the low half: it comes first in memory.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(low))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(high))) << 16;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ float quarter(const float4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes into shared memory, past L1 and without registers; zeros unless `valid`.
__device__ __forceinline__ void copy_async(uint4* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but the latest `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes that are read once. Volatile: it must not move down to where the value is used.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

__device__ __forceinline__ float4 as_floats(const uint4& x) {
  return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
}

// sum[16 x 8] += a[16 x 16] b[16 x 8], float32 += bfloat16 * bfloat16, over one warp. With g = lane / 4 and
// c = lane % 4:
//   a0: row g, columns 2c, 2c+1    a1: row g + 8, the same    a2, a3: as a0, a1, columns + 8
//   b0: rows 2c, 2c+1 of column g  b1: rows + 8
//   sum: [g, 2c], [g, 2c+1], [g + 8, 2c], [g + 8, 2c+1]
__device__ __forceinline__ void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Programmatic dependent launch; no effect when the launch did not ask for overlap. A kernel here lets the next
// one start after it has waited itself, so when a kernel starts, all but the one right before it have ended:
// until it waits it may read constants, and what was written before that one.
__device__ __forceinline__ void wait_for_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_grid_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// Weights that a later kernel reads: on their way into the L2 cache while memory would lie idle. Block `block`
// of `blocks` asks for its share, one warp for all of it; nobody waits for it.
struct Ahead {
  const char* data;
  int64_t bytes;  // a multiple of 16
};
__device__ __forceinline__ void fetch_ahead(const Ahead& ahead, int block, int blocks) {
  constexpr int kPiece = 4096;
  if (threadIdx.x >= kWarp) return;
  for (int64_t at = (static_cast<int64_t>(block) * kWarp + threadIdx.x) * kPiece; at < ahead.bytes;
       at += static_cast<int64_t>(blocks) * kWarp * kPiece) {
    const int64_t left = ahead.bytes - at;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(ahead.data + at),
                 "r"(static_cast<uint32_t>(left < kPiece ? left : kPiece))
                 : "memory");
  }
}

__device__ __forceinline__ void fetch_all_ahead(const Ahead (&ahead)[2], int block, int blocks) {
  fetch_ahead(ahead[0], block, blocks);
  fetch_ahead(ahead[1], block, blocks);
}

// Clusters: a few blocks on neighbouring multiprocessors that can write into each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
// A meeting of all threads of a cluster, in two halves. It orders only what the mailbox's fence does.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// With this first half, what any block did before it, in global memory too, comes before what all do after it.
__device__ __forceinline__ void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive_release();
  cluster_wait();
}

// A mailbox in shared memory: a barrier that opens when `bytes` have come from blocks of the cluster. One
// thread makes it before the cluster's first meeting; others may send after that.
__device__ __forceinline__ void make_mailbox(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Writes block `rank`'s copy of `address` and tells that block's copy of `barrier`.
__device__ __forceinline__ void send(float* address, uint64_t* barrier, int rank, float value) {
  uint32_t there, mailbox;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(address)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mailbox)
               : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there),
               "f"(value), "r"(mailbox)
               : "memory");
}

__device__ __forceinline__ void receive(uint64_t* barrier) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
}

}  // namespace crossfuse
