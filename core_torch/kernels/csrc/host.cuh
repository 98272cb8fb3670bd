// What the host side of every kernel shares: checks of operands that say what came, and launches.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include <initializer_list>
#include <string>

namespace crossfuse {

using tvm::ffi::TensorView;

constexpr DLDataType kBFloat16{kDLBfloat, 16, 1}, kFloat32{kDLFloat, 32, 1};
constexpr DLDataType kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1};

inline bool is(TensorView x, DLDataType dtype) {
  return x.dtype().code == dtype.code && x.dtype().bits == dtype.bits && x.dtype().lanes == 1;
}

inline bool is_index(TensorView x) { return is(x, kInt32) || is(x, kInt64); }

// Raises ValueError unless `x` has this shape (-1: any size) and dense rows; its first stride may be any.
inline void check_rows(TensorView x, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = x.ndim() == static_cast<int32_t>(shape.size());
  int64_t dense = 1;
  for (int i = x.ndim() - 1; fits && i >= 0; --i) {
    const int64_t want = shape.begin()[i];
    fits = (want < 0 || x.size(i) == want) && (i == 0 || x.size(i) == 1 || x.stride(i) == dense);
    dense *= x.size(i);
  }
  if (!fits) {
    std::string wanted, got;
    for (int64_t size : shape) wanted += (size < 0 ? "any" : std::to_string(size)) + " ";
    for (int i = 0; i < x.ndim(); ++i) {
      got += std::to_string(x.size(i)) + " (stride " + std::to_string(x.stride(i)) + ") ";
    }
    TVM_FFI_THROW(ValueError) << name << " must have dense rows and shape [ " << wanted << "], got [ " << got
                              << "]";
  }
}

// The same, and the rows follow one another without gaps.
inline void check_dense(TensorView x, const char* name, std::initializer_list<int64_t> shape) {
  check_rows(x, name, shape);
  int64_t row = 1;
  for (int i = 1; i < x.ndim(); ++i) row *= x.size(i);
  if (x.ndim() > 0 && x.size(0) > 1 && x.stride(0) != row) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous, got a first stride of " << x.stride(0)
                              << " where a row has " << row << " elements";
  }
}

inline void check_dtype(TensorView x, const char* name, DLDataType dtype) {
  if (!is(x, dtype)) {
    TVM_FFI_THROW(TypeError) << name << " must be " << tvm::ffi::DLDataTypeToString(dtype) << ", got "
                             << tvm::ffi::DLDataTypeToString(x.dtype());
  }
}

inline void check_index(TensorView x, const char* name) {
  if (!is_index(x)) {
    TVM_FFI_THROW(TypeError) << name << " must be int32 or int64, got "
                             << tvm::ffi::DLDataTypeToString(x.dtype());
  }
}

// Raises ValueError unless all are on one CUDA device.
inline void check_devices(std::initializer_list<TensorView> operands) {
  const DLDevice first = operands.begin()->device();
  for (TensorView x : operands) {
    if (x.device().device_type != kDLCUDA || x.device().device_id != first.device_id) {
      TVM_FFI_THROW(ValueError) << "all operands must be on one CUDA device, got device types and numbers "
                                << first.device_type << ":" << first.device_id << " and "
                                << x.device().device_type << ":" << x.device().device_id;
    }
  }
}

template <typename T>
T* data(TensorView x) {
  return static_cast<T*>(x.data_ptr());
}

inline cudaStream_t current_stream(TensorView x) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(x.device().device_type, x.device().device_id));
}

inline int num_multiprocessors(TensorView x) {
  int count = 0;
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.device().device_id));
  return count;
}

// What `fetch_ahead` takes: a contiguous operand's bytes, or none.
template <typename Ahead>
Ahead ahead_of(const tvm::ffi::Optional<TensorView>& x, TensorView beside) {
  if (!x.has_value()) return {nullptr, 0};
  const TensorView tensor = x.value();
  check_devices({beside, tensor});
  int64_t bytes = tensor.dtype().bits / 8;
  for (int i = tensor.ndim() - 1; i >= 0; --i) {
    if (tensor.size(i) > 1 && tensor.stride(i) * (tensor.dtype().bits / 8) != bytes) {
      TVM_FFI_THROW(ValueError) << "what is fetched ahead must be contiguous";
    }
    bytes *= tensor.size(i);
  }
  return {data<const char>(tensor), bytes / 16 * 16};
}

struct Launch {
  dim3 grid, block;
  cudaStream_t stream;
  bool overlap;  // may start while the previous kernel on the stream ends (programmatic dependent launch)
  unsigned cluster = 0;  // blocks of a cluster; 0: the kernel uses none
  size_t shared_bytes = 0;  // dynamic
};

template <typename... Params, typename... Args>
void launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = how.overlap;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = how.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.stream = how.stream;
  config.dynamicSmemBytes = how.shared_bytes;
  config.attrs = attributes;
  config.numAttrs = how.cluster > 0 ? 2 : 1;
  TVM_FFI_CHECK_CUDA_ERROR(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

}  // namespace crossfuse
