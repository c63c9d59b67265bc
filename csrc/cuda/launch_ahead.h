// launch.h for kernels that nvcc compiled into this module, started by the CUDA runtime that is linked into it.
#pragma once

#include <cuda_runtime_api.h>

namespace hypenet::cuda {

// The bytes of shared memory that each device lets a block of a kernel ask for; less than 0 before the first launch.
// The compiler's atomics: C++20's <atomic> would cost every nvcc compilation of a launcher two seconds.
class KernelState {
 public:
  KernelState() {
    for (int& bytes : allowed_) bytes = -1;
  }
  int allowed(int device) const { return __atomic_load_n(&allowed_[device], __ATOMIC_ACQUIRE); }
  void allow(int device, int bytes) { __atomic_store_n(&allowed_[device], bytes, __ATOMIC_RELEASE); }

 private:
  int allowed_[kMaxDevices];
};

template <class Params>
struct Kernel {
  const char* name;
  void (*entry)(Params);
  KernelState& state;
};

template <class Params>
Kernel<Params> make_kernel(const char* name, void (*entry)(Params), KernelState& state) {
  return {name, entry, state};
}

#define KERNEL(name, ...)                                              \
  [] {                                                                 \
    static KernelState state;                                          \
    return make_kernel(#name, &name __VA_OPT__(<__VA_ARGS__>), state); \
  }()

inline Status find_device(int index, Device& device) {
  cudaError_t error = cudaDeviceGetAttribute(&device.num_processors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Before a kernel's first launch on the current device: loads it, also while a graph is captured, and asks for the
// shared memory, of which as much as there is shall be that of blocks and not cache.
inline cudaError_t prepare(const void* entry, const Size& size) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, entry);
  if (error == cudaSuccess && size.shared_bytes != 0) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(size.shared_bytes));
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return error == cudaSuccess ? restored : error;
}

inline Status start_untyped(const char* name, const void* entry, KernelState& state, const Size& size,
                            Stream stream, const void* params) {
  const auto failed = [&](cudaError_t error) { return launch_error(name, size, cudaGetErrorString(error)); };
  if (stream.device < 0 || stream.device >= kMaxDevices) return launch_error(name, size, "no such device");
  if (const cudaError_t error = cudaSetDevice(stream.device); error != cudaSuccess) return failed(error);
  const int bytes = static_cast<int>(size.shared_bytes);
  if (state.allowed(stream.device) < bytes) {
    Device device;
    if (const Status status = find_device(stream.device, device); status != nullptr) return status;
    if (bytes > device.max_shared_bytes) return too_much_shared_memory(name, size, device.max_shared_bytes);
    if (const cudaError_t error = prepare(entry, size); error != cudaSuccess) return failed(error);
    state.allow(stream.device, bytes);
  }
  void* arguments[] = {const_cast<void*>(params)};
  const cudaError_t error = cudaLaunchKernel(entry, dim3(static_cast<unsigned>(size.num_blocks)),
                                             dim3(static_cast<unsigned>(size.num_threads)), arguments,
                                             size.shared_bytes, stream.handle);
  return error == cudaSuccess ? nullptr : failed(error);
}

template <class Params>
Status start(const Kernel<Params>& kernel, const Size& size, Stream stream, const Params& params) {
  return start_untyped(kernel.name, reinterpret_cast<const void*>(kernel.entry), kernel.state, size, stream,
                       &params);
}

}  // namespace hypenet::cuda
