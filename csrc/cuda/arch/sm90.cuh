// The instructions that sm_90a adds to sm80.cuh: one function each, and inline PTX nowhere else. On a host csrc/emu
// executes the same functions.
//
// Proxies. Ordinary loads, stores and cp.async go through the generic proxy; wgmma reads shared memory, and copy_bulk
// writes it, through the async proxy. What a thread wrote through the generic proxy is visible to a wgmma only if that
// thread called fence_async_proxy after the write (for cp.async: after wait_copies), and then synchronised with the
// warps that execute the wgmma. A write over what a wgmma reads must come after its wait_wgmma, in time order.
//
// A warpgroup is 4 warps, the first of which is a multiple of 4. Its 128 threads execute fence_wgmma, wgmma,
// commit_wgmma and wait_wgmma together:
//
//   fence_wgmma(d);         // before the first wgmma of a group, and after the last write to registers of its A and D
//   wgmma<bf16>(d, ...);    // any number of them; those on one accumulator are added in order
//   commit_wgmma();         // closes the group
//   wait_wgmma<0>(d);       // only now may d be read, and registers and shared memory of the operands be written
//
// Fragments of wgmma m64nNk16 in warp w of the warpgroup, lane l: row = 16 w + l / 4, column pair c = 2 (l % 4):
//   a[4] of A [64, 16]      {(row, c), (row + 8, c), (row, c + 8), (row + 8, c + 8)}, two elements each
//   d[N / 2] of D [64, N]   d[4 j] to d[4 j + 3]: (row, n), (row, n + 1), (row + 8, n), (row + 8, n + 1), n = 8 j + c
#pragma once

#include "sm80.cuh"

#ifndef __CUDACC__
#include "../../emu/arch90.h"
#else

namespace hypenet::cuda::arch {

constexpr int kWarpgroupSize = 128;

// ---- mbarriers: a phase ends when `count` threads have arrived and all announced bytes have landed; then the next
// one begins. Phases are numbered from 0, and `parity` is that of a phase's number.

struct alignas(8) Mbarrier {
  uint64_t state;
};

// By one thread, followed by fence_mbarrier_init and a barrier of all threads that use it.
__device__ __forceinline__ void init_mbarrier(Mbarrier& bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(&bar)), "r"(count)
               : "memory");
}

// Makes this thread's init_mbarrier visible to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

// Arrives at the current phase; what this thread did before happens before what follows a wait for that phase.
__device__ __forceinline__ void arrive(Mbarrier& bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(&bar)) : "memory");
}

// The same, and announces `bytes` that copy_bulk will bring.
__device__ __forceinline__ void arrive_expect(Mbarrier& bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(&bar)), "r"(bytes)
               : "memory");
}

// Until the current phase is one of the other parity: until the last phase of this parity has ended. Before the first
// phase ends, parity 1 counts as ended.
__device__ __forceinline__ void wait(Mbarrier& bar, int parity) {
  uint32_t ended;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(shared_address(&bar)), "r"(parity)
                 : "memory");
  } while (ended == 0);
}

// One thread copies `bytes`, through the async proxy, and `bar` counts them when they have landed. Both addresses and
// `bytes` are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Mbarrier& bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(&bar))
               : "memory");
}

// This thread's earlier writes to shared memory become visible to the async proxy.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

// ---- roles of warps

// Arrives at barrier `barrier` of sync_group without waiting; by whole warps, which count among `num_threads`.
__device__ __forceinline__ void arrive_group(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(num_threads) : "memory");
}

// The warpgroup's registers per thread from here on, a multiple of 8 in 24 to 256. The 64 K registers of the SM are
// shared by all: `up` waits until other warpgroups have given enough away by `down`.
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// ---- wgmma

// Which of an operand's two dimensions is contiguous in shared memory: that of the sum, or the other one.
enum class Major { kK, kMN };

// An operand in shared memory, in rows of 128 bytes (64 elements) whose 16-byte vectors are swizzled: vector v of row r
// is stored at v ^ r % 8. Rows come in groups of 8, each 1024 bytes at a multiple of 1024.
//   K-major    a row is one m (or n). `first` is element (0, k), k a multiple of 16 in the row. Groups of 8 rows are
//              `stride_bytes` apart; `leading_bytes` is not used
//   MN-major   a row is one k, 64 elements of m (or n). The 16 rows are two groups of 8, `stride_bytes` apart; the next
//              64 elements of m (or n), if there are more, are `leading_bytes` further on
__device__ __forceinline__ uint64_t matrix_descriptor(const void* first, int stride_bytes,
                                                      int leading_bytes = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

// Keeps the compiler from moving what computes or reads d across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]) : : "memory");
}

// Orders earlier accesses to registers before the group of wgmma that follows; `d` are its accumulators.
template <int... kCounts>
__device__ __forceinline__ void fence_wgmma(float (&... d)[kCounts]) {
  (pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

__device__ __forceinline__ void commit_wgmma() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// Until at most kPending groups are under way; `d` are accumulators of groups that have ended.
template <int kPending, int... kCounts>
__device__ __forceinline__ void wait_wgmma(float (&... d)[kCounts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  (pin(d), ...);
}

// The operands of D, as text and as a list: HYPENET_D8 and HYPENET_F8(0) are the first eight.
#define HYPENET_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HYPENET_D16 HYPENET_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HYPENET_D24 HYPENET_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define HYPENET_D32 HYPENET_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HYPENET_D64                                                                         \
  HYPENET_D32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HYPENET_D128                                                                         \
  HYPENET_D64                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "  \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "    \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define HYPENET_F8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HYPENET_F16(i) HYPENET_F8(i), HYPENET_F8(i + 8)
#define HYPENET_F24(i) HYPENET_F16(i), HYPENET_F8(i + 16)
#define HYPENET_F32(i) HYPENET_F16(i), HYPENET_F16(i + 16)
#define HYPENET_F64(i) HYPENET_F32(i), HYPENET_F32(i + 32)
#define HYPENET_F128(i) HYPENET_F64(i), HYPENET_F64(i + 64)

// One instruction: n columns, in d[half]; `p` is the operand that says whether to accumulate, `majors` those that
// transpose. The operands after D are numbered from `half` on.
#define HYPENET_WGMMA_ASM(n, half, type, a_text, b, p, majors, ...)                                     \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n         \
               "k16.f32." type "." type " {" HYPENET_D##half "}, " a_text ", %" #b ", p, 1, 1, " majors \
                                                             "; }"                                      \
               : HYPENET_F##half(0)                                                                     \
               : __VA_ARGS__)
#define HYPENET_WGMMA_REGISTERS(n, half, a0, a1, a2, a3, b_, p, major)                                 \
  if constexpr (kHalf == half && kIsBFloat16) {                                                        \
    HYPENET_WGMMA_ASM(n, half, "bf16", "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", b_, p, "%" #major,  \
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposeB)); \
  } else if constexpr (kHalf == half) {                                                                \
    HYPENET_WGMMA_ASM(n, half, "f16", "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", b_, p, "%" #major,   \
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposeB)); \
  }
#define HYPENET_WGMMA_SHARED(n, half, a_, b_, p, major_a, major_b)                                           \
  if constexpr (kHalf == half && kIsBFloat16) {                                                              \
    HYPENET_WGMMA_ASM(n, half, "bf16", "%" #a_, b_, p, "%" #major_a ", %" #major_b, "l"(a), "l"(b),          \
                      "r"(add), "n"(kTransposeA), "n"(kTransposeB));                                         \
  } else if constexpr (kHalf == half) {                                                                      \
    HYPENET_WGMMA_ASM(n, half, "f16", "%" #a_, b_, p, "%" #major_a ", %" #major_b, "l"(a), "l"(b), "r"(add), \
                      "n"(kTransposeA), "n"(kTransposeB));                                                   \
  }

// The widths N that kernels use, as d[N / 2].
template <int kHalf>
constexpr bool kIsWgmmaWidth =
    kHalf == 8 || kHalf == 16 || kHalf == 24 || kHalf == 32 || kHalf == 64 || kHalf == 128;

// d = a b, or d += a b with `accumulate`: A [64, 16] from registers, B [16, N] by descriptor, accumulated in fp32.
template <class Element, Major kMajorB = Major::kK, int kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kHalf], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate = true) {
  static_assert((std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>) && kIsWgmmaWidth<kHalf>);
  constexpr bool kIsBFloat16 = std::is_same_v<Element, bf16>;
  constexpr int kTransposeB = kMajorB == Major::kMN;
  const int add = accumulate;
  HYPENET_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13, 14)
  HYPENET_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22)
  HYPENET_WGMMA_REGISTERS(48, 24, 24, 25, 26, 27, 28, 29, 30)
  HYPENET_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38)
  HYPENET_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70)
  HYPENET_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134)
}

// The same with A by descriptor.
template <class Element, Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kHalf], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert((std::is_same_v<Element, bf16> || std::is_same_v<Element, fp16>) && kIsWgmmaWidth<kHalf>);
  constexpr bool kIsBFloat16 = std::is_same_v<Element, bf16>;
  constexpr int kTransposeA = kMajorA == Major::kMN, kTransposeB = kMajorB == Major::kMN;
  const int add = accumulate;
  HYPENET_WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12)
  HYPENET_WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20)
  HYPENET_WGMMA_SHARED(48, 24, 24, 25, 26, 27, 28)
  HYPENET_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36)
  HYPENET_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68)
  HYPENET_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132)
}

#undef HYPENET_D8
#undef HYPENET_D16
#undef HYPENET_D24
#undef HYPENET_D32
#undef HYPENET_D64
#undef HYPENET_D128
#undef HYPENET_F8
#undef HYPENET_F16
#undef HYPENET_F24
#undef HYPENET_F32
#undef HYPENET_F64
#undef HYPENET_F128
#undef HYPENET_WGMMA_ASM
#undef HYPENET_WGMMA_REGISTERS
#undef HYPENET_WGMMA_SHARED

}  // namespace hypenet::cuda::arch

#endif
