// cuda/arch on the host: the same functions, executed by the emulated machine. They are documented there. Without
// HYPENET_EMULATED they are only declared, for launchers of kernels that somebody else compiles.
#pragma once

#include <cstddef>

#if HYPENET_EMULATED
// Copies made by calls are checked like other accesses (access.cpp).
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("hypenet_emu_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("hypenet_emu_memmove");
void* memset(void*, int, size_t) noexcept __asm__("hypenet_emu_memset");
}
#endif

#include "machine.h"

namespace hypenet::cuda::arch {

using emu::kWarpSize;
constexpr bool kIsBlackwell = false;

inline int thread_idx() { return emu::thread_idx(); }
inline unsigned block_idx() { return emu::block_idx(); }

// ---- shared memory and barriers

constexpr size_t kMaxSharedBytes = 227 * 1024;

template <class Smem>
Smem& shared_memory() {
  return *static_cast<Smem*>(emu::shared_memory(sizeof(Smem), alignof(Smem)));
}

inline void sync_block() { emu::sync_block(); }
inline void sync_warp() { emu::sync_warp(); }
inline void sync_group(int barrier, int num_threads) { emu::sync_group(barrier, num_threads); }

// ---- shuffles

template <class T>
T shuffle_xor(T value, int mask) {
  emu::shuffle("shuffle_xor", &value, sizeof(T), emu::thread_idx() % kWarpSize ^ mask);
  return value;
}

template <class T>
T shuffle(T value, int lane) {
  emu::shuffle("shuffle", &value, sizeof(T), lane % kWarpSize);
  return value;
}

template <class T>
T shuffle_up(T value, int delta) {
  const int lane = emu::thread_idx() % kWarpSize;
  emu::shuffle("shuffle_up", &value, sizeof(T), lane < delta ? lane : lane - delta);
  return value;
}

inline bool any(bool value) {
  int found = value;
  for (int mask = 1; mask < kWarpSize; mask *= 2) found |= shuffle_xor(found, mask);
  return found;
}

// ---- 16-byte accesses

inline float4 load_16_bytes_once(const float* address) {
  return std::bit_cast<float4>(emu::load_16_bytes(address));
}
inline void store_16_bytes(float* address, float4 x) {
  emu::store_16_bytes(address, std::bit_cast<uint4>(x));
}
inline uint4 load_16_bytes(const void* address) { return emu::load_16_bytes(address); }
inline void store_16_bytes(void* address, uint4 x) { emu::store_16_bytes(address, x); }
inline uint2 load_8_bytes(const void* address) {
  return std::bit_cast<uint2>(*static_cast<const uint64_t*>(address));
}
inline void store_8_bytes(void* address, uint2 x) {
  *static_cast<uint64_t*>(address) = std::bit_cast<uint64_t>(x);
}

// ---- asynchronous copies

inline uint32_t shared_address(const void* shared) { return emu::shared_address(shared); }

inline void copy_16_async(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, 16, valid);
}
inline void copy_4_async(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, 4, valid);
}
inline void commit_copies() { emu::commit_copies(); }
template <int kPending>
void wait_copies() {
  emu::wait_copies(kPending);
}

// ---- matrix fragments

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu::ldmatrix_x4(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emu::ldmatrix_x4(r, row, true); }

inline uint32_t transpose_8x8(uint32_t x) {
  const int lane = emu::thread_idx() % kWarpSize;
  const int column = lane / 4, first = lane % 4 * 8 + column / 2;  // lane of (2 (lane % 4), column)
  const uint32_t low = shuffle(x, first), high = shuffle(x, first + 4);
  const int shift = column % 2 * 16;
  return (low >> shift & 0xffffu) | (high >> shift & 0xffffu) << 16;
}

template <class Element>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>);
  emu::mma(std::is_same_v<Element, bf16> ? emu::Product::kBFloat16 : emu::Product::kFloat16, d, a, b);
}

inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::Product::kTF32, d, a, b);
}

// To 10 bits of fraction, ties away from zero.
inline uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fffffff;
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

// ---- what the compiler may know

inline int opaque(int x) { return x; }

// ---- arithmetic

inline float exp2(float x) { return emu::flushed(::exp2f(x)); }
inline float reciprocal(float x) { return emu::flushed(1.0f / emu::flushed(x)); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emu::widen(x); }
inline float to_float(fp16 x) { return emu::widen(x); }

inline void from_float(float& to, float x) { to = x; }
inline void from_float(bf16& to, float x) { to = emu::narrow<bf16>(x); }
inline void from_float(fp16& to, float x) { to = emu::narrow<fp16>(x); }

template <class Element>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(emu::narrow<Element>(high).bits) << 16 | emu::narrow<Element>(low).bits;
}

template <class Element>
float2 unpack(uint32_t pair) {
  return {emu::widen(Element{static_cast<uint16_t>(pair)}),
          emu::widen(Element{static_cast<uint16_t>(pair >> 16)})};
}

}  // namespace hypenet::cuda::arch
