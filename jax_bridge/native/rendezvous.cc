// The fused op on CPU: the shards of one group meet inside the custom call, each on its own XLA thread.
//
// Rounding contract, the same as the GPU kernel's: the partial sums are added in float32 in rank order and
// rounded to the dtype; the residual is added and rounded to the dtype; the norm is taken in float32 from that
// rounded value, with (weight_bias + weight) in float32.
//
// A call that one rank makes and another does not, or that ranks make in different orders, would add unrelated
// numbers. So each call carries a sequence number, and the last rank to arrive compares sequence numbers, shapes,
// dtypes, residuals and weights of all ranks. A difference, or a rank that does not come in time, poisons the
// group: this call fails on every rank, and so does each later one, all with the first reason.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

using tvm::ffi::TensorView;

struct Call {
  const void* partial = nullptr;
  const void* residual = nullptr;  // null for the plain sum
  const void* weight = nullptr;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int32_t sequence = 0;
  DLDataType dtype{};
};

struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  std::chrono::milliseconds timeout{0};
  std::vector<Call> calls;    // by rank; valid while `present`
  std::vector<bool> present;  // by rank
  int64_t num_arrived = 0;
  int64_t num_computing = 0;
  int64_t meeting = 0;     // completed gatherings
  bool computing = false;  // all have arrived and at least one still reads its peers' partial sums
  std::string poison;      // the first failure; empty while the group is sound
};

std::mutex table_mutex;
std::map<std::pair<int64_t, int64_t>, std::shared_ptr<Group>> table;  // (communicator, group) -> Group
int64_t completed_calls = 0;                                          // over all ranks; guarded by table_mutex

std::shared_ptr<Group> find_group(int64_t communicator, int64_t group) {
  std::lock_guard<std::mutex> lock(table_mutex);
  auto found = table.find({communicator, group});
  if (found == table.end()) {
    TVM_FFI_THROW(RuntimeError) << "fused communicator " << communicator
                                << " is closed: the function was compiled while it was open and may only run inside"
                                   " its `with` block";
  }
  return found->second;
}

float load(const void* data, int64_t index, DLDataType dtype) {
  if (dtype.code == kDLFloat && dtype.bits == 32) return static_cast<const float*>(data)[index];
  if (dtype.code == kDLBfloat) {
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  return static_cast<float>(static_cast<const _Float16*>(data)[index]);
}

// `value` rounded to nearest even in the dtype.
float round_to(float value, DLDataType dtype) {
  if (dtype.code == kDLFloat && dtype.bits == 32) return value;
  if (dtype.code == kDLFloat) return static_cast<float>(static_cast<_Float16>(value));
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = std::isnan(value) ? 0x7FC00000u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Stores `value`, which is already a value of the dtype.
void store(void* data, int64_t index, float value, DLDataType dtype) {
  if (dtype.code == kDLFloat && dtype.bits == 32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype.code == kDLBfloat) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
  } else {
    static_cast<_Float16*>(data)[index] = static_cast<_Float16>(value);
  }
}

bool same_dtype(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

bool same_bytes(const void* a, const void* b, int64_t count, DLDataType dtype) {
  return a == b || (a != nullptr && b != nullptr && std::memcmp(a, b, count * dtype.bits / 8) == 0);
}

std::string describe(const Call& call) {
  return "call " + std::to_string(call.sequence) + " [" + std::to_string(call.num_tokens) + ", " +
         std::to_string(call.hidden_size) + "]" + (call.residual == nullptr ? " sum" : " sum+residual+norm");
}

// What is wrong with this gathering, or "" when all ranks make the same call.
std::string disagreement(const std::vector<Call>& calls) {
  const Call& first = calls[0];
  for (size_t rank = 1; rank < calls.size(); ++rank) {
    const Call& call = calls[rank];
    std::string ranks = "rank 0 is in " + describe(first) + ", rank " + std::to_string(rank) + " in " + describe(call);
    if (call.sequence != first.sequence || call.num_tokens != first.num_tokens ||
        call.hidden_size != first.hidden_size || !same_dtype(call.dtype, first.dtype) ||
        (call.residual == nullptr) != (first.residual == nullptr)) {
      return "the ranks met in different calls: " + ranks +
             ". Independent calls have no order; thread one through them with jax_bridge.CallOrder";
    }
    if (!same_bytes(call.residual, first.residual, call.num_tokens * call.hidden_size, call.dtype)) {
      return "residual differs between ranks: " + ranks +
             ". The residual must be replicated over the axis; if it is, independent calls have lost their order";
    }
    if (!same_bytes(call.weight, first.weight, call.hidden_size, call.dtype)) {
      return "weight differs between ranks: " + ranks + ". The norm's weight must be replicated over the axis";
    }
  }
  return "";
}

// Poisons the group and raises. The caller holds the group's mutex.
[[noreturn]] void fail(Group& group, const std::string& reason) {
  if (group.poison.empty()) group.poison = reason;
  group.changed.notify_all();
  TVM_FFI_THROW(RuntimeError) << group.poison;
  __builtin_unreachable();
}

// Waits until every rank has arrived with the same call; returns their calls by rank.
std::vector<Call> arrive(Group& group, int64_t rank, const Call& call) {
  auto deadline = std::chrono::steady_clock::now() + group.timeout;
  std::unique_lock<std::mutex> lock(group.mutex);
  group.changed.wait_until(lock, deadline, [&] { return !group.poison.empty() || !group.computing; });
  if (!group.poison.empty()) fail(group, group.poison);
  if (group.computing) fail(group, "rank " + std::to_string(rank) + " could not enter " + describe(call) + " in time");
  if (group.present[rank]) {
    fail(group, "rank " + std::to_string(rank) + " is in two calls at once: " + describe(group.calls[rank]) + " and " +
                    describe(call) + ". Independent calls have no order; thread one through them with"
                    " jax_bridge.CallOrder, and dispatch from one Python thread at a time");
  }
  group.present[rank] = true;
  group.calls[rank] = call;
  int64_t meeting = group.meeting;
  if (++group.num_arrived == static_cast<int64_t>(group.calls.size())) {
    std::string wrong = disagreement(group.calls);
    if (!wrong.empty()) fail(group, wrong);
    group.meeting++;
    group.computing = true;
    group.num_computing = group.num_arrived;
    group.changed.notify_all();
  } else if (!group.changed.wait_until(lock, deadline,
                                       [&] { return group.meeting != meeting || !group.poison.empty(); })) {
    std::string missing;
    for (size_t other = 0; other < group.calls.size(); ++other) {
      if (!group.present[other]) missing += (missing.empty() ? "" : ", ") + std::to_string(other);
    }
    fail(group, "rank " + std::to_string(rank) + " waited " + std::to_string(group.timeout.count()) + " ms in " +
                    describe(call) + " for rank(s) " + missing +
                    " (XLA on CPU also stalls with more than 32 programs in flight: block_until_ready now and then)");
  }
  if (group.meeting == meeting) fail(group, group.poison);
  return group.calls;
}

// Waits until no rank reads this rank's partial sum any more: its buffer is XLA's again afterwards.
void leave(Group& group) {
  std::unique_lock<std::mutex> lock(group.mutex);
  int64_t meeting = group.meeting;
  if (--group.num_computing == 0) {
    group.num_arrived = 0;
    group.present.assign(group.present.size(), false);
    group.computing = false;
    group.meeting++;
    group.changed.notify_all();
  } else {
    group.changed.wait(lock, [&] { return group.meeting != meeting; });
  }
  lock.unlock();
  std::lock_guard<std::mutex> table_lock(table_mutex);
  completed_calls++;
}

// In float32 in rank order, rounded once.
float sum_over_ranks(const std::vector<Call>& calls, int64_t index, DLDataType dtype) {
  float sum = 0.0f;
  for (const Call& call : calls) sum += load(call.partial, index, dtype);
  return round_to(sum, dtype);
}

// partial, residual [T, D], weight [D]; place int32 [2] = (group, rank in the group); sequence int32 [1].
void allreduce_residual_rmsnorm(TensorView partial, TensorView residual, TensorView weight, TensorView place,
                                TensorView sequence, TensorView new_residual, TensorView normed,
                                TensorView new_sequence, int64_t communicator, double eps, double weight_bias) {
  const int32_t* where = static_cast<const int32_t*>(place.data_ptr());
  std::shared_ptr<Group> group = find_group(communicator, where[0]);
  int64_t num_tokens = partial.size(0), hidden_size = partial.size(1);
  DLDataType dtype = partial.dtype();
  int32_t number = *static_cast<const int32_t*>(sequence.data_ptr());
  std::vector<Call> calls = arrive(*group, where[1],
                                   Call{partial.data_ptr(), residual.data_ptr(), weight.data_ptr(), num_tokens,
                                        hidden_size, number, dtype});
  for (int64_t token = 0; token < num_tokens; ++token) {
    int64_t begin = token * hidden_size;
    double squares = 0.0;
    for (int64_t i = begin; i < begin + hidden_size; ++i) {
      float sum = round_to(load(residual.data_ptr(), i, dtype) + sum_over_ranks(calls, i, dtype), dtype);
      store(new_residual.data_ptr(), i, sum, dtype);  // may be residual's own buffer
      squares += static_cast<double>(sum) * sum;
    }
    float scale = 1.0f / std::sqrt(static_cast<float>(squares / hidden_size) + static_cast<float>(eps));
    for (int64_t d = 0; d < hidden_size; ++d) {
      float factor = static_cast<float>(weight_bias) + load(weight.data_ptr(), d, dtype);
      float value = load(new_residual.data_ptr(), begin + d, dtype) * scale * factor;
      store(normed.data_ptr(), begin + d, round_to(value, dtype), dtype);
    }
  }
  *static_cast<int32_t*>(new_sequence.data_ptr()) = number + 1;
  leave(*group);
}

// partial [T, D]; place int32 [2] = (group, rank in the group); sequence int32 [1].
void allreduce(TensorView partial, TensorView place, TensorView sequence, TensorView total, TensorView new_sequence,
               int64_t communicator) {
  const int32_t* where = static_cast<const int32_t*>(place.data_ptr());
  std::shared_ptr<Group> group = find_group(communicator, where[0]);
  int64_t num_tokens = partial.size(0), hidden_size = partial.size(1);
  DLDataType dtype = partial.dtype();
  int32_t number = *static_cast<const int32_t*>(sequence.data_ptr());
  std::vector<Call> calls =
      arrive(*group, where[1], Call{partial.data_ptr(), nullptr, nullptr, num_tokens, hidden_size, number, dtype});
  for (int64_t i = 0; i < num_tokens * hidden_size; ++i) {
    store(total.data_ptr(), i, sum_over_ranks(calls, i, dtype), dtype);
  }
  *static_cast<int32_t*>(new_sequence.data_ptr()) = number + 1;
  leave(*group);
}

void open_group(int64_t communicator, int64_t group, int64_t world_size, int64_t timeout_ms) {
  auto fresh = std::make_shared<Group>();
  fresh->calls.resize(world_size);
  fresh->present.assign(world_size, false);
  fresh->timeout = std::chrono::milliseconds(timeout_ms);
  std::lock_guard<std::mutex> lock(table_mutex);
  table[{communicator, group}] = fresh;
}

// Ranks that are still inside get an error now, not at their timeout.
void close_group(int64_t communicator, int64_t group) {
  std::shared_ptr<Group> closed;
  {
    std::lock_guard<std::mutex> lock(table_mutex);
    auto found = table.find({communicator, group});
    if (found == table.end()) return;  // every rank of the group closes it, the first one does
    closed = found->second;
    table.erase(found);
  }
  std::lock_guard<std::mutex> lock(closed->mutex);
  if (closed->poison.empty()) {
    closed->poison = "fused communicator " + std::to_string(communicator) +
                     " was closed while a call ran: block_until_ready before its `with` block ends";
  }
  closed->changed.notify_all();
}

int64_t count_completed() {
  std::lock_guard<std::mutex> lock(table_mutex);
  return completed_calls;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(allreduce_residual_rmsnorm, allreduce_residual_rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(allreduce, allreduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_group, open_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_group, close_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_completed, count_completed);
