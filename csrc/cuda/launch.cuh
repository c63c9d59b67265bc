// The one way by which a kernel is started, and what the host knows of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../params.h"
#include "kernels.h"

#ifdef HYPENET_EMULATED
#include "../emu/launch.h"
#else

#include <cuda_runtime_api.h>

namespace hypenet::cuda {

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Processors (SMs) of the current device.
inline Status num_processors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return status_of(error);
  return status_of(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
}

// Largest shared memory that a block of the current device can ask for, in bytes.
inline Status max_shared_bytes(int& bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return status_of(error);
  return status_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Lets a block of a kernel ask for `bytes` of shared memory.
inline Status allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes <= kSharedBytesWithoutAsking) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) return nullptr;
  int most = 0;
  if (const Status status = max_shared_bytes(most); status != nullptr) return status;
  return bytes <= static_cast<size_t>(most)
             ? status_of(error)
             : "a block of this GPU has less shared memory than the kernel needs (compute capability 9.0 "
               "has it; 8.0 too, but not for chunk ops with K above 128)";
}

// Starts `num_blocks` blocks, all along x, so that the number of sequences is bounded by 2^31 - 1 blocks
// alone. `name` is the kernel's in tables and reports.
template <class Params>
Status launch([[maybe_unused]] const char* name, void (*kernel)(Params), int64_t num_blocks, int num_threads,
              size_t shared_bytes, Stream stream, const Params& params) {
  if (num_blocks == 0) return nullptr;
  if (num_blocks > std::numeric_limits<int32_t>::max()) return "too many blocks for one launch";
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (const Status status = allow_shared_bytes(entry, shared_bytes); status != nullptr) return status;
  void* arguments[] = {const_cast<Params*>(&params)};
  return status_of(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(num_blocks)),
                                    dim3(static_cast<unsigned>(num_threads)), arguments, shared_bytes,
                                    stream));
}

}  // namespace hypenet::cuda

#endif
