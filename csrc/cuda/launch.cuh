// The one way by which a kernel is started.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../params.h"
#include "kernels.h"

namespace hypenet::cuda {

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Starts `num_blocks` blocks, all along x, so that the number of sequences is bounded by 2^31 - 1 blocks
// alone.
template <class Params>
Status launch(void (*kernel)(Params), int64_t num_blocks, int num_threads, size_t shared_bytes, Stream stream,
              const Params& params) {
  if (num_blocks == 0) return nullptr;
  if (num_blocks > std::numeric_limits<int32_t>::max()) return "too many blocks for one launch";
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return status_of(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(num_blocks)),
                                    dim3(static_cast<unsigned>(num_threads)), arguments, shared_bytes,
                                    stream));
}

}  // namespace hypenet::cuda
