// XLA custom calls on GPUs -> the decode kernels of core_torch, for those whose parameters XLA cannot order.
//
// XLA hands over all operands, then all results. What a kernel changes in place is a result on its operand's buffer
// (input_output_aliases); here it is checked to be that, and left out. XLA calls this when it captures a CUDA graph,
// not at every step; nothing here allocates or waits.
//
// Shapes: B sequences, T tokens, H query heads, d head_dim.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace {

using tvm::ffi::Function;
using tvm::ffi::TensorView;

std::mutex table_mutex;
std::map<std::string, Function> table;  // by the name of the kernel

void set_kernel(tvm::ffi::String name, Function kernel) {
  std::lock_guard<std::mutex> lock(table_mutex);
  table.insert_or_assign(std::string(name), kernel);
}

Function find_kernel(const char* name) {
  std::lock_guard<std::mutex> lock(table_mutex);
  auto found = table.find(name);
  if (found == table.end()) TVM_FFI_THROW(RuntimeError) << "kernel " << name << " was not loaded in this process";
  return found->second;
}

void check_in_place(TensorView operand, TensorView result, const char* name) {
  if (operand.data_ptr() != result.data_ptr()) {
    TVM_FFI_THROW(RuntimeError) << name << " is changed in place, but XLA gave its result a buffer of its own";
  }
}

// The residual that `add_norm` may lack; XLA has no operand that is missing.
void norm(TensorView summed, TensorView weight, TensorView out, double eps, double weight_bias, bool launch_with_pdl) {
  find_kernel("norm")(summed, nullptr, weight, nullptr, out, eps, weight_bias, launch_with_pdl);
}

void gdn_decode(TensorView projected, TensorView conv, TensorView state, TensorView slots, TensorView conv_weight,
                TensorView a_log, TensorView dt_bias, TensorView norm_weight, TensorView out, TensorView new_conv,
                TensorView new_state, double eps, int64_t units_per_block, bool launch_with_pdl) {
  check_in_place(conv, new_conv, "conv");
  check_in_place(state, new_state, "state");
  find_kernel("gdn_decode")(projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, out, eps,
                            units_per_block, launch_with_pdl);
}

void norm_rope(TensorView projected, TensorView positions, TensorView slots, TensorView q_weight, TensorView k_weight,
               TensorView k_cache, TensorView v_cache, TensorView q, TensorView new_k_cache, TensorView new_v_cache,
               int64_t rotary_dim, double theta, double eps, double weight_bias, bool launch_with_pdl) {
  check_in_place(k_cache, new_k_cache, "k_cache");
  check_in_place(v_cache, new_v_cache, "v_cache");
  find_kernel("norm_rope")(projected, positions, slots, q_weight, k_weight, k_cache, v_cache, q, rotary_dim, theta,
                           eps, weight_bias, launch_with_pdl);
}

// The output gate [B, H d] lies in the projections [B, ...] behind q: a view of them, where XLA would copy.
void paged_decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_tables, TensorView lengths,
                  TensorView projected, TensorView values, TensorView sums, TensorView out, double scale,
                  bool launch_with_pdl) {
  const int64_t width = q.size(1) * q.size(2);
  int64_t shape[] = {q.size(0), width}, strides[] = {projected.size(1), 1};
  DLTensor gate{};
  gate.data = static_cast<char*>(projected.data_ptr()) + width * (projected.dtype().bits / 8);
  gate.device = projected.device();
  gate.ndim = 2;
  gate.dtype = projected.dtype();
  gate.shape = shape;
  gate.strides = strides;
  find_kernel("paged_decode")(q, k_cache, v_cache, page_tables, lengths, values, sums, out, TensorView(&gate), scale,
                              launch_with_pdl);
}

// A key has 64 bits, where XLA in its usual mode has 32: two of them [T, 2]. Every rank counts its entries from zero.
void vocabulary_argmax(TensorView logits, TensorView halves, bool launch_with_pdl) {
  int64_t shape[] = {halves.size(0)}, strides[] = {1};
  DLTensor keys{};
  keys.data = halves.data_ptr();
  keys.device = halves.device();
  keys.ndim = 1;
  keys.dtype = DLDataType{kDLInt, 64, 1};
  keys.shape = shape;
  keys.strides = strides;
  find_kernel("vocabulary_argmax")(logits, TensorView(&keys), int64_t{0}, launch_with_pdl);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_kernel, set_kernel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm, norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gdn_decode, gdn_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope, norm_rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_decode, paged_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(vocabulary_argmax, vocabulary_argmax);
