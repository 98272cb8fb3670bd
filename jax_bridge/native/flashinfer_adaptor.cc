// XLA custom calls on GPUs -> FlashInfer's all-reduce kernel, on XLA's stream.
//
// A custom call may not name a rank or a pointer: every device runs the same program. So the workspace is found by
// (communicator, device ordinal): the communicator is an attribute, and jax-tvm-ffi puts the ordinal into each
// tensor. XLA calls this when it captures a CUDA graph, or at each step of what it does not capture.
//
// Outside a capture the host threads of a group's devices meet before and after each launch. The driver may load code
// at a kernel's first launch (cuBLAS, cuDNN and Triton's do): it holds a lock of the whole process while it waits for
// the GPU. If that GPU is in a reduction whose other half has yet to be launched, from a thread that wants the lock,
// nothing moves again. XLA does the same around NCCL's first calls (openxla/xla 38932). Captures need not meet, and
// must not: XLA may capture on one device alone.
//
// Shapes: partial, residual and results [T, D], weight [D]; T tokens, D hidden.

#include <dlfcn.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace {

using tvm::ffi::Function;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// FlashInfer's AllReduceFusionPattern.
constexpr int64_t kAllReduce = 0;
constexpr int64_t kARResidualRMSNorm = 1;

// Where the host threads of a group's devices in this process wait for each other.
struct Meeting {
  std::mutex mutex;
  std::chrono::milliseconds timeout{0};
  int64_t size = 0;  // devices
  int64_t waiting = 0;
  std::atomic<int64_t> completed{0};
};

struct Rank {
  Function kernel;  // FlashInfer's trtllm_allreduce_fusion
  int64_t world_size;
  int64_t rank;
  Tensor workspace;  // int64 on the device: the kernel's table of pointers
  std::shared_ptr<Meeting> meeting;
};

std::mutex table_mutex;
std::map<std::pair<int64_t, int64_t>, Rank> table;  // (communicator, device ordinal) -> Rank
std::map<std::pair<int64_t, int64_t>, std::weak_ptr<Meeting>> meetings;  // (communicator, group) -> Meeting
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

bool is_capturing(TensorView on_device) {
  if (on_device.device().device_type != kDLCUDA) return false;
  using Query = int (*)(void* stream, int* status);  // the driver that XLA has loaded
  static const Query query = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return driver == nullptr ? nullptr : reinterpret_cast<Query>(dlsym(driver, "cuStreamIsCapturing"));
  }();
  if (query == nullptr) TVM_FFI_THROW(RuntimeError) << "libcuda.so.1 has no cuStreamIsCapturing";
  const DLDevice device = on_device.device();
  int status = 0;  // CU_STREAM_CAPTURE_STATUS_NONE
  const int error = query(TVMFFIEnvGetStream(device.device_type, device.device_id), &status);
  if (error != 0) TVM_FFI_THROW(RuntimeError) << "cuStreamIsCapturing gave CUresult " << error;
  return status != 0;
}

// Returns when every device of the group is here. One that waits in vain says so and goes on: its peer may have taken
// this reduction from a CUDA graph, as where a profile begins between the two (XLA then runs graphs kernel by kernel).
void meet(Meeting& meeting, int64_t ordinal) {
  constexpr std::chrono::microseconds kBusy{100};
  int64_t number;
  {
    std::lock_guard<std::mutex> lock(meeting.mutex);
    number = meeting.completed.load();
    if (++meeting.waiting >= meeting.size) {
      meeting.waiting = 0;
      meeting.completed++;
      return;
    }
  }
  const auto start = std::chrono::steady_clock::now();
  while (meeting.completed.load() == number) {
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > kBusy) std::this_thread::sleep_for(kBusy);
    if (waited < meeting.timeout) continue;
    std::lock_guard<std::mutex> lock(meeting.mutex);
    if (meeting.completed.load() != number) return;
    meeting.waiting--;
    std::fprintf(stderr,
                 "crossfuse: GPU %lld waited %lld ms in a fused reduction for the other GPUs of its group to be"
                 " launched, and goes on without them\n",
                 static_cast<long long>(ordinal), static_cast<long long>(meeting.timeout.count()));
    return;
  }
}

// Runs `launch`, between two meetings of the group where XLA does not capture.
template <typename Launch>
void launch_together(const Rank& self, TensorView on_device, Launch launch) {
  const bool meets = self.meeting->size > 1 && !is_capturing(on_device);
  const int64_t ordinal = on_device.device().device_id;
  if (meets) meet(*self.meeting, ordinal);
  launch();
  if (meets) meet(*self.meeting, ordinal);
}

// float16 and bfloat16 are summed in float32; a float32 kernel with that flag does not exist.
bool accumulates_in_float32(TensorView x) { return x.dtype().bits == 16; }

void allreduce_residual_rmsnorm(TensorView partial, TensorView residual, TensorView weight, TensorView new_residual,
                                TensorView normed, int64_t communicator, double eps, double weight_bias,
                                bool use_oneshot, bool launch_with_pdl) {
  Rank self = find_rank(communicator, partial);
  launch_together(self, partial, [&] {
    self.kernel(partial, self.world_size, self.rank, partial.size(0), partial.size(1), self.workspace, launch_with_pdl,
                use_oneshot, /*trigger_completion_at_end=*/true, accumulates_in_float32(partial), kARResidualRMSNorm,
                /*allreduce_out=*/nullptr, residual, new_residual, normed, /*quant_out=*/nullptr,
                /*scale_out=*/nullptr, weight, eps, /*scale_factor=*/nullptr, /*layout_code=*/nullptr,
                /*block_quant_group_size=*/nullptr, weight_bias);
  });
}

void allreduce(TensorView partial, TensorView total, int64_t communicator, bool use_oneshot, bool launch_with_pdl) {
  Rank self = find_rank(communicator, partial);
  launch_together(self, partial, [&] {
    self.kernel(partial, self.world_size, self.rank, partial.size(0), partial.size(1), self.workspace, launch_with_pdl,
                use_oneshot, /*trigger_completion_at_end=*/true, accumulates_in_float32(partial), kAllReduce, total,
                /*residual_in=*/nullptr, /*residual_out=*/nullptr, /*norm_out=*/nullptr, /*quant_out=*/nullptr,
                /*scale_out=*/nullptr, /*rms_gamma=*/nullptr, /*rms_eps=*/nullptr, /*scale_factor=*/nullptr,
                /*layout_code=*/nullptr, /*block_quant_group_size=*/nullptr, /*weight_bias=*/nullptr);
  });
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

void open_rank(int64_t communicator, int64_t ordinal, int64_t group, Function kernel, int64_t world_size, int64_t rank,
               Tensor workspace, int64_t timeout_ms) {
  std::lock_guard<std::mutex> lock(table_mutex);
  std::shared_ptr<Meeting> meeting = meetings[{communicator, group}].lock();
  if (meeting == nullptr) {
    meeting = std::make_shared<Meeting>();
    meetings[{communicator, group}] = meeting;
  }
  meeting->size++;
  meeting->timeout = std::chrono::milliseconds(timeout_ms);
  table.insert_or_assign({communicator, ordinal}, Rank{kernel, world_size, rank, workspace, meeting});
}

void close_rank(int64_t communicator, int64_t ordinal) {
  std::lock_guard<std::mutex> lock(table_mutex);
  table.erase({communicator, ordinal});
}

// What a launch does before and after; for tests.
void meet_on(int64_t communicator, int64_t ordinal) {
  std::shared_ptr<Meeting> meeting;
  {
    std::lock_guard<std::mutex> lock(table_mutex);
    meeting = table.at({communicator, ordinal}).meeting;
  }
  meet(*meeting, ordinal);
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(meet_on, meet_on);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_host_launches, count_host_launches);
