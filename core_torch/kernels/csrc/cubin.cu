// TVM-FFI: load(cubin, name, threads, shared_bytes, unused, scalars, operands, order, same) -> function
//
// Kernels that another compiler made (Triton), as TVM-FFI functions. The function is called with `operands` tensors,
// then its scalars (one letter each: i, an int, 32 bits; f, a float), then the grid's x and y. `order`: which of the
// tensors are the kernel's pointers, in its order; `same`: pairs of tensors that must be one buffer (what XLA passes
// as an operand and again as its result). `unused`: pointers behind the scalars that the compiler added and that this
// kernel leaves alone. On TVM-FFI's current stream; nothing is allocated.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/cuda/cubin_launcher.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host.cuh"

namespace crossfuse::cubin {

constexpr uintptr_t kAlignment = 16;  // what the kernels were compiled for

struct Kernel {
  tvm::ffi::Bytes image;
  tvm::ffi::CubinModule module;
  tvm::ffi::CubinKernel kernel;
  std::string name, scalars;
  unsigned threads, shared_bytes;
  int64_t unused, operands;
  std::vector<int64_t> order, same;

  Kernel(tvm::ffi::Bytes cubin, const std::string& name, int64_t shared_bytes)
      : image(cubin),
        module(image),
        kernel(module.GetKernelWithMaxDynamicSharedMemory(name.c_str(), shared_bytes)),
        name(name),
        shared_bytes(static_cast<unsigned>(shared_bytes)) {}
};

union Scalar {
  int32_t i;
  float f;
};

void* checked_pointer(const Kernel& kernel, TensorView x, int64_t place, DLDevice device) {
  if (x.device().device_type != kDLCUDA || x.device().device_id != device.device_id) {
    TVM_FFI_THROW(ValueError) << kernel.name << ": all operands must be on one CUDA device";
  }
  void* pointer = x.data_ptr();
  if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0) {
    TVM_FFI_THROW(ValueError) << kernel.name << ": operand " << place << " must begin at a multiple of " << kAlignment
                              << " bytes";
  }
  return pointer;
}

void run(Kernel& kernel, tvm::ffi::PackedArgs args) {
  const int64_t scalars = static_cast<int64_t>(kernel.scalars.size());
  if (args.size() != kernel.operands + scalars + 2) {
    TVM_FFI_THROW(TypeError) << kernel.name << " takes " << kernel.operands << " tensors, " << scalars
                             << " scalars and a grid of two, got " << args.size() << " arguments";
  }
  const auto tensor = [&](int64_t place) { return args[static_cast<int>(place)].cast<TensorView>(); };
  const DLDevice device = tensor(0).device();
  for (size_t i = 0; i + 1 < kernel.same.size(); i += 2) {
    if (tensor(kernel.same[i]).data_ptr() != tensor(kernel.same[i + 1]).data_ptr()) {
      TVM_FFI_THROW(RuntimeError) << kernel.name << ": operand " << kernel.same[i]
                                  << " is changed in place, but XLA gave its result a buffer of its own";
    }
  }
  std::vector<void*> pointers;
  std::vector<Scalar> values(scalars);
  for (int64_t place : kernel.order) pointers.push_back(checked_pointer(kernel, tensor(place), place, device));
  void* nothing = nullptr;
  std::vector<void*> parameters;
  for (void*& pointer : pointers) parameters.push_back(&pointer);
  for (int64_t i = 0; i < scalars; ++i) {
    const int place = static_cast<int>(kernel.operands + i);
    if (kernel.scalars[i] == 'i') {
      values[i].i = static_cast<int32_t>(args[place].cast<int64_t>());
    } else {
      values[i].f = static_cast<float>(args[place].cast<double>());
    }
    parameters.push_back(&values[i]);
  }
  parameters.insert(parameters.end(), kernel.unused, &nothing);
  const int place = static_cast<int>(kernel.operands + scalars);
  const int64_t x = args[place].cast<int64_t>(), y = args[place + 1].cast<int64_t>();
  if (x == 0 || y == 0) return;
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  TVM_FFI_CHECK_CUDA_ERROR(kernel.kernel.Launch(
      parameters.data(), tvm::ffi::dim3(static_cast<uint32_t>(x), static_cast<uint32_t>(y)),
      tvm::ffi::dim3(kernel.threads), current_stream(tensor(0)), kernel.shared_bytes));
}

tvm::ffi::Function load(tvm::ffi::Bytes image, tvm::ffi::String name, int64_t threads, int64_t shared_bytes,
                        int64_t unused, tvm::ffi::String scalars, int64_t operands, tvm::ffi::Array<int64_t> order,
                        tvm::ffi::Array<int64_t> same) {
  auto kernel = std::make_shared<Kernel>(image, std::string(name), shared_bytes);
  kernel->scalars = std::string(scalars);
  kernel->threads = static_cast<unsigned>(threads);
  kernel->unused = unused;
  kernel->operands = operands;
  kernel->order.assign(order.begin(), order.end());
  kernel->same.assign(same.begin(), same.end());
  return tvm::ffi::Function::FromPacked(
      [kernel](tvm::ffi::PackedArgs args, tvm::ffi::Any*) { run(*kernel, args); });
}

}  // namespace crossfuse::cubin

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load, crossfuse::cubin::load);
