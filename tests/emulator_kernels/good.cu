// Correct kernels that together use every function of cuda/arch and of tile.cuh.
#include "cuda/arch/sm80.cuh"
#include "cuda/launch.h"
#include "cuda/tile.cuh"
#include "kernels.h"

namespace hypenet::emu_tests {
namespace {

using namespace cuda;
constexpr int kThreads = 128;
constexpr int kM = 64, kN = 64, kK = 128;

// ---- C [64, 64] = A [64, 128] B [128, 64]: 4 warps with 16 rows each. A and B are stored as they are or transposed.

template <class Element, bool kTransposedA, bool kTransposedB>
struct GemmSmem {
  Tile<Element, kTransposedA ? kK : kM, kTransposedA ? kM : kK> a;
  Tile<Element, kTransposedB ? kN : kK, kTransposedB ? kK : kN> b;
  Tile<Element, kM, kN> c;
};

template <class Element, bool kTransposedA, bool kTransposedB>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Operands p) {
  using Smem = GemmSmem<Element, kTransposedA, kTransposedB>;
  auto& smem = arch::shared_memory<Smem>();
  const int thread = arch::thread_idx(), m = warp_idx() * 16;
  copy_tile_async<kThreads>(smem.a, static_cast<const Element*>(p.a), smem.a.kCols, smem.a.kRows, thread);
  copy_tile_async<kThreads>(smem.b, static_cast<const Element*>(p.b), smem.b.kCols, smem.b.kRows, thread);
  arch::commit_copies();
  arch::wait_copies<0>();
  arch::sync_block();

  float d[8][4] = {};
  for (int k = 0; k < kK; k += 16) {
    uint32_t a[4];
    if constexpr (kTransposedA) {
      load_a_transposed(a, smem.a, m, k);
    } else {
      load_a(a, smem.a, m, k);
    }
    for (int n = 0; n < kN; n += 16) {
      uint32_t b[2][2];
      if constexpr (kTransposedB) {
        load_b_transposed(b, smem.b, k, n);
      } else {
        load_b(b, smem.b, k, n);
      }
      arch::mma_16x8x16<Element>(d[n / 8], a, b[0]);
      arch::mma_16x8x16<Element>(d[n / 8 + 1], a, b[1]);
    }
  }
  for (int n = 0; n < kN; n += 8) store_d(smem.c, m, n, d[n / 8]);
  arch::sync_warp();
  auto* out = static_cast<Element*>(p.c) + arch::block_idx() * kM * kN;
  store_tile<kThreads>(out + m * kN, kN, 0, smem.c, thread);  // no rows: touches nothing
  for (int i = lane_idx(); i < 16 * kN / 8; i += 32) {
    const int row = m + i / 8, col = i % 8 * 8;
    arch::store_16_bytes(out + row * kN + col, arch::load_16_bytes(smem.c.at(row, col)));
  }
}

template <class Element, bool kTransposedA, bool kTransposedB>
Status gemm(const Operands& p, Stream stream) {
  return launch(make_kernel("gemm", gemm_kernel<Element, kTransposedA, kTransposedB>), p.num_blocks, kThreads,
                sizeof(GemmSmem<Element, kTransposedA, kTransposedB>), stream, p);
}

// C [16, 8] = A [16, 8] B [8, 8] in tf32, one warp.
__global__ void __launch_bounds__(32, 1) tf32_kernel(const __grid_constant__ Operands p) {
  const auto *ga = static_cast<const float*>(p.a), *gb = static_cast<const float*>(p.b);
  const int row = lane_idx() / 4, col = lane_idx() % 4;
  const uint32_t a[4] = {arch::to_tf32(ga[row * 8 + col]), arch::to_tf32(ga[(row + 8) * 8 + col]),
                         arch::to_tf32(ga[row * 8 + col + 4]), arch::to_tf32(ga[(row + 8) * 8 + col + 4])};
  const uint32_t b[2] = {arch::to_tf32(gb[col * 8 + row]), arch::to_tf32(gb[(col + 4) * 8 + row])};
  float d[4] = {};
  arch::mma_16x8x8_tf32(d, a, b);
  auto* c = static_cast<float*>(p.c);
  c[row * 8 + col * 2] = d[0], c[row * 8 + col * 2 + 1] = d[1];
  c[(row + 8) * 8 + col * 2] = d[2], c[(row + 8) * 8 + col * 2 + 1] = d[3];
}

Status tf32(const Operands& p, Stream stream) {
  return launch(make_kernel("tf32", tf32_kernel), p.num_blocks, 32, 0, stream, p);
}

// c[0] = a permuted by xor 5, c[1] = a of lane 7, c[2] = a of 3 lanes below; in double, float and integers.
template <class T>
__global__ void __launch_bounds__(64, 1) shuffles_kernel(const __grid_constant__ Operands p) {
  const int i = arch::thread_idx();
  const T x = static_cast<const T*>(p.a)[i];
  auto* c = static_cast<T*>(p.c);
  c[i] = arch::shuffle_xor(x, 5);
  c[64 + i] = arch::shuffle(x, 7);
  c[128 + i] = arch::shuffle_up(x, 3);
}

template <class T>
Status shuffles(const Operands& p, Stream stream) {
  return launch(make_kernel("shuffles", shuffles_kernel<T>), p.num_blocks, 64, 0, stream, p);
}

// One group of warps fills a ring of two slots, the other reads and doubles the values. The barrier of a round
// signals both that its slot is full and that the other one is empty.
struct Slots {
  float x[2][64];
};

__global__ void __launch_bounds__(kThreads, 1) ring_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<Slots>();
  const int i = arch::thread_idx() % 64;
  const bool fills = arch::thread_idx() < 64;
  for (int round = 0; round < p.n; ++round) {
    const int slot = round % 2;
    if (fills) smem.x[slot][i] = static_cast<const float*>(p.a)[round * 64 + i];
    arch::sync_group(1 + slot, kThreads);
    if (!fills) static_cast<float*>(p.c)[round * 64 + i] = 2.0f * smem.x[slot][63 - i];
  }
}

Status ring(const Operands& p, Stream stream) {
  return launch(make_kernel("ring", ring_kernel), p.num_blocks, kThreads, sizeof(Slots), stream, p);
}

// c [128] = the sums of the columns of a [n, 128], four rows a stage, three stages in flight.
struct Stages {
  alignas(128) float rows[3][4][kThreads];
};

__global__ void __launch_bounds__(kThreads, 1) pipeline_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<Stages>();
  const int thread = arch::thread_idx(), row = thread / 32, col = thread % 32 * 4;
  const auto fetch = [&](int64_t stage) {
    const int64_t from = stage * 4 + row;
    const bool valid = from < p.n;
    const auto* a = static_cast<const float*>(p.a);
    arch::copy_16_async(&smem.rows[stage % 3][row][col], valid ? a + from * kThreads + col : a, valid);
    arch::commit_copies();
  };
  fetch(0);
  fetch(1);
  float sum = 0.0f;
  for (int64_t stage = 0; stage * 4 < p.n; ++stage) {
    arch::wait_copies<1>();
    arch::sync_block();
    fetch(stage + 2);
    for (int i = 0; i < 4; ++i) sum += smem.rows[stage % 3][i][thread];
  }
  arch::wait_copies<0>();
  static_cast<float*>(p.c)[thread] = sum;
}

Status pipeline(const Operands& p, Stream stream) {
  return launch(make_kernel("pipeline", pipeline_kernel), p.num_blocks, kThreads, sizeof(Stages), stream, p);
}

// Threads may exit if no barrier follows.
__global__ void __launch_bounds__(kThreads, 1) early_exit_kernel(const __grid_constant__ Operands p) {
  const int i = arch::thread_idx();
  if (i % 3 == 0) return;
  static_cast<float*>(p.c)[i] = 1.0f;
}

Status early_exit(const Operands& p, Stream stream) {
  return launch(make_kernel("early_exit", early_exit_kernel), p.num_blocks, kThreads, 0, stream, p);
}

// c = a as Element and back; each element by one thread.
template <class Element>
__global__ void __launch_bounds__(kThreads, 1) round_trip_kernel(const __grid_constant__ Operands p) {
  const int64_t i = 2 * (arch::block_idx() * kThreads + arch::thread_idx());
  if (i >= p.n) return;
  const auto* a = static_cast<const float*>(p.a);
  auto* c = static_cast<float*>(p.c);
  Element x;
  arch::from_float(x, a[i]);
  c[i] = arch::to_float(x);
  c[i + 1] = arch::unpack<Element>(arch::pack<Element>(a[i], a[i + 1])).y;
}

template <class Element>
Status round_trip(const Operands& p, Stream stream) {
  return launch(make_kernel("round_trip", round_trip_kernel<Element>), p.num_blocks, kThreads, 0, stream, p);
}

// c [4, n]: 2^a, 1 / a, 1 / sqrt(a), a rounded to tf32.
__global__ void __launch_bounds__(kThreads, 1) arithmetic_kernel(const __grid_constant__ Operands p) {
  const int64_t i = arch::block_idx() * kThreads + arch::thread_idx();
  if (i >= p.n) return;
  const float a = static_cast<const float*>(p.a)[i];
  auto* c = static_cast<float*>(p.c);
  const uint32_t rounded = arch::to_tf32(a);
  c[i] = arch::exp2(a), c[p.n + i] = arch::reciprocal(a), c[2 * p.n + i] = rsqrtf(a);
  c[3 * p.n + i] = reinterpret_cast<const float&>(rounded);
}

Status arithmetic(const Operands& p, Stream stream) {
  return launch(make_kernel("arithmetic", arithmetic_kernel), p.num_blocks, kThreads, 0, stream, p);
}

}  // namespace

using arch::bf16, arch::fp16;
const Entry kGood[] = {
    {"gemm_bf16_nn", gemm<bf16, false, false>},
    {"gemm_bf16_tn", gemm<bf16, true, false>},
    {"gemm_bf16_nt", gemm<bf16, false, true>},
    {"gemm_bf16_tt", gemm<bf16, true, true>},
    {"gemm_fp16_nn", gemm<fp16, false, false>},
    {"gemm_fp16_tn", gemm<fp16, true, false>},
    {"gemm_fp16_nt", gemm<fp16, false, true>},
    {"gemm_fp16_tt", gemm<fp16, true, true>},
    {"tf32", tf32},
    {"shuffles_float32", shuffles<float>},
    {"shuffles_float64", shuffles<double>},
    {"shuffles_int32", shuffles<int>},
    {"ring", ring},
    {"pipeline", pipeline},
    {"early_exit", early_exit},
    {"round_trip_bfloat16", round_trip<bf16>},
    {"round_trip_float16", round_trip<fp16>},
    {"arithmetic", arithmetic},
    {nullptr, nullptr},
};

}  // namespace hypenet::emu_tests
