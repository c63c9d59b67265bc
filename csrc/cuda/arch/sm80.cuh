// Every feature of the machine that kernels use from sm_80 up: one function each, and inline PTX nowhere
// else. A kernel written against these functions does not care who plays them: the GPU here, or csrc/emu on a
// host.
//
// Fragments of one warp, lane l, row l / 4, column pair c = 2 (l % 4):
//   a[4] of A [16, 16]   {(row, c), (row + 8, c), (row, c + 8), (row + 8, c + 8)}, two elements each
//   b[2] of B [16, 8]    {(c, row), (c + 8, row)}: two elements down a column
//   d[4] of D [16, 8]    (row, c), (row, c + 1), (row + 8, c), (row + 8, c + 1), fp32
#pragma once

#ifndef __CUDACC__
#include "../../emu/arch.h"
#else

#include <cstdint>
#include <type_traits>

#include "float16.h"

namespace hypenet::cuda::arch {

constexpr int kWarpSize = 32;

// Code for Blackwell takes more registers for the same source.
#if __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif

__device__ __forceinline__ int thread_idx() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ unsigned block_idx() { return blockIdx.x; }

// ---- shared memory and barriers

// The most that a block can have where this code runs: of compute capability 8.0, and of later ones up to 8.9, which
// share its code, at most as much.
#if __CUDA_ARCH__ >= 1200
constexpr size_t kMaxSharedBytes = 99 * 1024;
#elif __CUDA_ARCH__ >= 900
constexpr size_t kMaxSharedBytes = 227 * 1024;
#else
constexpr size_t kMaxSharedBytes = 163 * 1024;
#endif

// The block's dynamic shared memory, as the plain struct that describes it.
template <class Smem>
__device__ __forceinline__ Smem& shared_memory() {
  static_assert(alignof(Smem) <= 1024);
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Smem*>(bytes);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Orders the memory accesses of the lanes of a warp; all of them take part.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Barrier `barrier` (1 to 15) among `num_threads` threads, a multiple of the warp size.
__device__ __forceinline__ void sync_group(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(num_threads) : "memory");
}

// ---- shuffles: all lanes of the warp take part

// Value of the lane whose number differs in the bits of `mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Value of the lane `delta` below; a lane without one keeps its own.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}

// Whether it is true for a lane of the warp.
__device__ __forceinline__ bool any(bool value) { return __any_sync(0xffffffffu, value); }

// ---- 16-byte accesses: `address` is a multiple of 16

// Data that nobody else on this SM will ask for: past L1.
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

// Any 16 bytes of global or shared memory.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return *static_cast<const uint4*>(address);
}
__device__ __forceinline__ void store_16_bytes(void* address, uint4 x) { *static_cast<uint4*>(address) = x; }

// 8 bytes: `address` is a multiple of 8.
__device__ __forceinline__ uint2 load_8_bytes(const void* address) {
  return *static_cast<const uint2*>(address);
}
__device__ __forceinline__ void store_8_bytes(void* address, uint2 x) { *static_cast<uint2*>(address) = x; }

// ---- asynchronous copies from global to shared memory

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes, both addresses multiples of 16; with `valid` false zeros, and nothing is read.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// 4 bytes, both addresses multiples of 4; as above.
__device__ __forceinline__ void copy_4_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last close.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until at most kPending of this thread's groups are under way. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// ---- matrix fragments. `row`: this lane's 16-byte row in shared memory, a multiple of 16. Lanes 8 i to
// 8 i + 7 give the rows of matrix i; all lanes take part.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// A matrix [8, 8] of 16-bit elements, two of a row in each lane as in a fragment, transposed.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d += a b, in fp32.
template <class Element>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<Element, fp16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same with A [16, 8] and B [8, 8] of tf32, each a float rounded by to_tf32:
//   a[4]   (row, l % 4), (row + 8, l % 4), (row, l % 4 + 4), (row + 8, l % 4 + 4)
//   b[2]   (l % 4, row), (l % 4 + 4, row)
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// ---- what the compiler may know

// x, about which the compiler knows nothing from here on: what is computed from it inside a loop stays there,
// instead of filling registers before it.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- arithmetic

// 2^x to 2 ulp; 0 for x = -inf, and below 2^-126.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp; 0 for x = inf.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, `low` in the low half: the first element of a pair.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<Element, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
  } else {
    static_assert(std::is_same_v<Element, fp16>);
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
  }
  return pair;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  float y;
#if __CUDA_ARCH__ >= 900
  asm("cvt.f32.bf16 %0, %1;" : "=f"(y) : "h"(x.bits));
#else
  asm("mov.b32 %0, {0, %1};" : "=f"(y) : "h"(x.bits));
#endif
  return y;
}
__device__ __forceinline__ float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// By a shift and a mask: to move the halves apart, ptxas would need two PRMT more for each pair that was just packed.
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, bf16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    static_assert(std::is_same_v<Element, fp16>);
    float2 x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x.x) : "r"(pair));
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x.y) : "r"(pair));
    return x;
  }
}

// Rounds to nearest even.
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(bf16& to, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void from_float(fp16& to, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}

}  // namespace hypenet::cuda::arch

#endif
