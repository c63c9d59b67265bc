// Every feature of the machine that kernels use from sm_80 up: one function each, and inline PTX nowhere
// else. A kernel written against these functions does not care who plays them.
#pragma once

#include <cstdint>

namespace hypenet::cuda::arch {

constexpr int kWarpSize = 32;

__device__ __forceinline__ int thread_idx() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ unsigned block_idx() { return blockIdx.x; }

// The block's dynamic shared memory, as the plain struct that describes it.
template <class Smem>
__device__ __forceinline__ Smem& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Smem*>(bytes);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Value of the lane whose number differs in the bits of `mask`. All lanes of the warp take part.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes that nobody else on this processor will ask for: past L1. `address` is a multiple of 16.
__device__ __forceinline__ float4 load_16_bytes_once(const float* address) {
  float4 x;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_16_bytes(float* address, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

}  // namespace hypenet::cuda::arch
