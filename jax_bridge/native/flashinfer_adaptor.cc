// XLA custom calls on GPUs -> FlashInfer's all-reduce kernel, on XLA's stream.
//
// A custom call may not name a rank or a pointer: every device runs the same program. So the workspace is found by
// (communicator, device ordinal): the communicator is an attribute, and jax-tvm-ffi puts the ordinal into each
// tensor. XLA calls this when it captures a CUDA graph, not at every step; nothing here allocates or waits.
//
// Shapes: partial, residual and results [T, D], weight [D]; T tokens, D hidden.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace {

using tvm::ffi::Function;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// FlashInfer's AllReduceFusionPattern.
constexpr int64_t kAllReduce = 0;
constexpr int64_t kARResidualRMSNorm = 1;

struct Rank {
  Function kernel;  // FlashInfer's trtllm_allreduce_fusion
  int64_t world_size;
  int64_t rank;
  Tensor workspace;  // int64 on the device: the kernel's table of pointers
};

std::mutex table_mutex;
std::map<std::pair<int64_t, int64_t>, Rank> table;  // (communicator, device ordinal) -> Rank
std::atomic<int64_t> host_launches{0};

Rank find_rank(int64_t communicator, TensorView on_device) {
  std::lock_guard<std::mutex> lock(table_mutex);
  auto found = table.find({communicator, on_device.device().device_id});
  if (found == table.end()) {
    TVM_FFI_THROW(RuntimeError) << "fused communicator " << communicator << " is not open on CUDA device "
                                << on_device.device().device_id
                                << ": a fused function runs inside the `with` block that it was compiled in, on the"
                                   " devices of its mesh";
  }
  host_launches++;
  return found->second;
}

// float16 and bfloat16 are summed in float32; a float32 kernel with that flag does not exist.
bool accumulates_in_float32(TensorView x) { return x.dtype().bits == 16; }

void allreduce_residual_rmsnorm(TensorView partial, TensorView residual, TensorView weight, TensorView new_residual,
                                TensorView normed, int64_t communicator, double eps, double weight_bias,
                                bool use_oneshot, bool launch_with_pdl) {
  Rank self = find_rank(communicator, partial);
  self.kernel(partial, self.world_size, self.rank, partial.size(0), partial.size(1), self.workspace, launch_with_pdl,
              use_oneshot, /*trigger_completion_at_end=*/true, accumulates_in_float32(partial), kARResidualRMSNorm,
              /*allreduce_out=*/nullptr, residual, new_residual, normed, /*quant_out=*/nullptr,
              /*scale_out=*/nullptr, weight, eps, /*scale_factor=*/nullptr, /*layout_code=*/nullptr,
              /*block_quant_group_size=*/nullptr, weight_bias);
}

void allreduce(TensorView partial, TensorView total, int64_t communicator, bool use_oneshot, bool launch_with_pdl) {
  Rank self = find_rank(communicator, partial);
  self.kernel(partial, self.world_size, self.rank, partial.size(0), partial.size(1), self.workspace, launch_with_pdl,
              use_oneshot, /*trigger_completion_at_end=*/true, accumulates_in_float32(partial), kAllReduce, total,
              /*residual_in=*/nullptr, /*residual_out=*/nullptr, /*norm_out=*/nullptr, /*quant_out=*/nullptr,
              /*scale_out=*/nullptr, /*rms_gamma=*/nullptr, /*rms_eps=*/nullptr, /*scale_factor=*/nullptr,
              /*layout_code=*/nullptr, /*block_quant_group_size=*/nullptr, /*weight_bias=*/nullptr);
}

// The same with a sequence number, int32 [1], that only carries a dependency: its result is the operand's buffer.
void ordered_allreduce_residual_rmsnorm(TensorView partial, TensorView residual, TensorView weight, TensorView,
                                        TensorView new_residual, TensorView normed, TensorView, int64_t communicator,
                                        double eps, double weight_bias, bool use_oneshot, bool launch_with_pdl) {
  allreduce_residual_rmsnorm(partial, residual, weight, new_residual, normed, communicator, eps, weight_bias,
                             use_oneshot, launch_with_pdl);
}

void ordered_allreduce(TensorView partial, TensorView, TensorView total, TensorView, int64_t communicator,
                       bool use_oneshot, bool launch_with_pdl) {
  allreduce(partial, total, communicator, use_oneshot, launch_with_pdl);
}

void open_rank(int64_t communicator, int64_t ordinal, Function kernel, int64_t world_size, int64_t rank,
               Tensor workspace) {
  std::lock_guard<std::mutex> lock(table_mutex);
  table.insert_or_assign({communicator, ordinal}, Rank{kernel, world_size, rank, workspace});
}

void close_rank(int64_t communicator, int64_t ordinal) {
  std::lock_guard<std::mutex> lock(table_mutex);
  table.erase({communicator, ordinal});
}

// How often the host launched a kernel: in eager runs and captures. Replays of a CUDA graph do not come by here.
int64_t count_host_launches() { return host_launches.load(); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(allreduce_residual_rmsnorm, allreduce_residual_rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(allreduce, allreduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ordered_allreduce_residual_rmsnorm, ordered_allreduce_residual_rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ordered_allreduce, ordered_allreduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_rank, open_rank);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_rank, close_rank);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_host_launches, count_host_launches);
