// Correct kernels that together use every function of cuda/arch/sm90.cuh.
#include "cuda/arch/sm90.cuh"
#include "cuda/launch.h"
#include "cuda/tile.cuh"
#include "kernels.h"

namespace hypenet::emu_tests {
namespace {

using namespace cuda;
using arch::bf16, arch::fp16;
using arch::Major, arch::Mbarrier;

constexpr int kM = 64, kK = 64;         // of a tile
constexpr int kTileRow = 128;           // bytes
constexpr int kPattern = 8 * kTileRow;  // after which the swizzle repeats

template <class Element, int kRows>
using Panel = Tile<Element, kRows, 64>;

// Columns or rows [0, num_rows) x [0, cols) of a matrix of `cols` columns, into a panel; by 128 threads.
template <class Panel>
__device__ __forceinline__ void copy_panel(Panel& panel, const void* global, int64_t stride, int rows,
                                           int cols) {
  const auto* from = static_cast<const typename Panel::Element*>(global);
  const int vectors = cols / kPiece;
  for (int i = arch::thread_idx() % 128; i < rows * vectors; i += 128) {
    const int row = i / vectors, col = i % vectors * kPiece;
    arch::copy_16_async(panel.at(row, col), from + row * stride + col, true);
  }
}

// A result [64, N] of this warpgroup, to rows of N floats.
template <int kHalf>
__device__ __forceinline__ void store_result(float* c, const float (&d)[kHalf]) {
  const int row = warp_idx() % 4 * 16 + lane_idx() / 4, col = lane_idx() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) c[(row + i / 2 % 2 * 8) * 2 * kHalf + i / 4 * 8 + col + i % 2] = d[i];
}

// ---- C [64, N] = A [64, 64] B [64, N] by one warpgroup. A is stored as [64, 64] or transposed (M-major), B as [64, N]
// (N-major) or transposed (K-major).

enum class From { kRegisters, kShared };

template <class Element, int kN, Major kMajorB>
struct GemmSmem {
  static constexpr int kPanels = kMajorB == Major::kK || kN < 64 ? 1 : kN / 64;
  alignas(1024) Panel<Element, 64> a;
  alignas(1024) Panel<Element, kMajorB == Major::kK ? kN : kK> b[kPanels];
};

template <class Element, int kN, From kFrom, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128, 1) wgmma_kernel(const __grid_constant__ Operands p) {
  using Smem = GemmSmem<Element, kN, kMajorB>;
  auto& smem = arch::shared_memory<Smem>();
  copy_panel(smem.a, p.a, 64, 64, 64);
  if constexpr (kMajorB == Major::kK) {
    copy_panel(smem.b[0], p.b, kK, kN, kK);
  } else {
    for (int i = 0; i < Smem::kPanels; ++i) {
      copy_panel(smem.b[i], static_cast<const Element*>(p.b) + i * 64, kN, kK, kN < 64 ? kN : 64);
    }
  }
  arch::commit_copies();
  arch::wait_copies<0>();
  arch::fence_async_proxy();
  arch::sync_block();

  uint32_t a[kK / 16][4];
  if constexpr (kFrom == From::kRegisters) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) load_a(a[k], smem.a, warp_idx() * 16, k * 16);
  }
  float d[kN / 2];
  arch::fence_wgmma();
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
    const auto b = kMajorB == Major::kK ? arch::matrix_descriptor(smem.b[0].data + k * 16, kPattern)
                                        : arch::matrix_descriptor(smem.b[0].data + k * 16 * 64, kPattern,
                                                                  static_cast<int>(sizeof smem.b[0]));
    if constexpr (kFrom == From::kRegisters) {
      arch::wgmma<Element, kMajorB>(d, a[k], b, k > 0);
    } else {
      const auto from = kMajorA == Major::kK ? smem.a.data + k * 16 : smem.a.data + k * 16 * 64;
      arch::wgmma<Element, kMajorA, kMajorB>(d, arch::matrix_descriptor(from, kPattern), b, k > 0);
    }
  }
  arch::commit_wgmma();
  arch::wait_wgmma<0>(d);
  store_result(static_cast<float*>(p.c), d);
}

template <class Element, int kN, From kFrom, Major kMajorA, Major kMajorB>
Status gemm(const Operands& p, Stream stream) {
  return launch(KERNEL(wgmma_kernel, Element, kN, kFrom, kMajorA, kMajorB), p.num_blocks, 128,
                sizeof(GemmSmem<Element, kN, kMajorB>), stream, p);
}

// ---- two groups in flight: z = A B0, o = A B1, then o += A B0 in a third group on the same accumulator.

struct TwoGroupsSmem {
  alignas(1024) Panel<bf16, 64> a;
  alignas(1024) Panel<bf16, 64> b[2];
};

__device__ __forceinline__ void multiply(float (&d)[32], const Panel<bf16, 64>& a, const Panel<bf16, 64>& b,
                                         bool add) {
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    arch::wgmma<bf16>(d, arch::matrix_descriptor(a.data + k, kPattern),
                      arch::matrix_descriptor(b.data + k, kPattern), add || k > 0);
  }
}

__global__ void __launch_bounds__(128, 1) two_groups_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<TwoGroupsSmem>();
  copy_panel(smem.a, p.a, 64, 64, 64);
  for (int i = 0; i < 2; ++i) copy_panel(smem.b[i], static_cast<const bf16*>(p.b) + i * 64 * 64, 64, 64, 64);
  arch::commit_copies();
  arch::wait_copies<0>();
  arch::fence_async_proxy();
  arch::sync_block();

  float z[32], o[32];
  arch::fence_wgmma();
  multiply(z, smem.a, smem.b[0], false);
  arch::commit_wgmma();
  arch::fence_wgmma();
  multiply(o, smem.a, smem.b[1], false);
  arch::commit_wgmma();
  arch::wait_wgmma<1>(z);
  auto* c = static_cast<float*>(p.c);
  store_result(c, z);
  arch::fence_wgmma();
  multiply(o, smem.a, smem.b[0], true);
  arch::commit_wgmma();
  arch::wait_wgmma<0>(o);
  store_result(c + kM * 64, o);
}

Status two_groups(const Operands& p, Stream stream) {
  return launch(KERNEL(two_groups_kernel), p.num_blocks, 128, sizeof(TwoGroupsSmem), stream, p);
}

// ---- C [128, 64] = the sum of A [n][128, 64] B [n][64, 64]^T: warpgroup 0 copies by cp.async, 1 and 2 multiply.

constexpr int kStages = 3;

struct PipelineSmem {
  struct Stage {
    alignas(1024) Panel<bf16, 128> a;
    alignas(1024) Panel<bf16, 64> b;
  } stages[kStages];
  Mbarrier full[kStages], empty[kStages];
};

__device__ __forceinline__ void start_pipeline(PipelineSmem& smem, int num_full, int num_empty) {
  if (arch::thread_idx() == 0) {
    for (int i = 0; i < kStages; ++i) {
      arch::init_mbarrier(smem.full[i], num_full);
      arch::init_mbarrier(smem.empty[i], num_empty);
    }
    arch::fence_mbarrier_init();
  }
  arch::sync_block();
}

__device__ __forceinline__ void consume(const Operands& p, PipelineSmem& smem, int consumer) {
  float d[32];
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % kStages];
    arch::wait(smem.full[i % kStages], i / kStages % 2);
    arch::fence_wgmma(d);
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      arch::wgmma<bf16>(d, arch::matrix_descriptor(stage.a.data + consumer * 64 * 64 + k, kPattern),
                        arch::matrix_descriptor(stage.b.data + k, kPattern), i > 0 || k > 0);
    }
    arch::commit_wgmma();
    arch::wait_wgmma<0>(d);
    // The wgmma of all four warps have ended, and they alone read the stage.
    if (arch::thread_idx() % 128 == 0) arch::arrive(smem.empty[i % kStages]);
  }
  store_result(static_cast<float*>(p.c) + consumer * 64 * 64, d);
}

__global__ void __launch_bounds__(384, 1) async_pipeline_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<PipelineSmem>();
  start_pipeline(smem, 128, 2);
  if (arch::thread_idx() >= 128) {
    arch::set_max_registers_up<232>();
    return consume(p, smem, arch::thread_idx() / 128 - 1);
  }
  arch::set_max_registers_down<40>();
  const auto arrive = [&](int i) {
    arch::fence_async_proxy();
    arch::arrive(smem.full[i % kStages]);
  };
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % kStages];
    arch::wait(smem.empty[i % kStages], i / kStages % 2 ^ 1);
    copy_panel(stage.a, static_cast<const bf16*>(p.a) + int64_t{i} * 128 * 64, 64, 128, 64);
    copy_panel(stage.b, static_cast<const bf16*>(p.b) + int64_t{i} * 64 * 64, 64, 64, 64);
    arch::commit_copies();
    if (i == 0) continue;
    arch::wait_copies<1>();
    arrive(i - 1);
  }
  arch::wait_copies<0>();
  arrive(static_cast<int>(p.n) - 1);
}

Status async_pipeline(const Operands& p, Stream stream) {
  return launch(KERNEL(async_pipeline_kernel), p.num_blocks, 384, sizeof(PipelineSmem), stream, p);
}

// The same by copy_bulk, from tiles that are swizzled in global memory: a warp after the two warpgroups copies.
__global__ void __launch_bounds__(288, 1) bulk_pipeline_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<PipelineSmem>();
  start_pipeline(smem, 1, 2);
  if (arch::thread_idx() < 256) return consume(p, smem, arch::thread_idx() / 128);
  if (lane_idx() != 0) return;
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % kStages];
    auto& full = smem.full[i % kStages];
    arch::wait(smem.empty[i % kStages], i / kStages % 2 ^ 1);
    arch::arrive_expect(full, sizeof stage.a + sizeof stage.b);
    arch::copy_bulk(stage.a.data, static_cast<const bf16*>(p.a) + int64_t{i} * 128 * 64, sizeof stage.a,
                    full);
    arch::copy_bulk(stage.b.data, static_cast<const bf16*>(p.b) + int64_t{i} * 64 * 64, sizeof stage.b, full);
  }
}

Status bulk_pipeline(const Operands& p, Stream stream) {
  return launch(KERNEL(bulk_pipeline_kernel), p.num_blocks, 288, sizeof(PipelineSmem), stream, p);
}

// ---- C [64, 64] = the sum of P V over n stages, P = A B^T rounded to bf16. Warpgroup 0 forms P and stores it in
// shared memory, 1 multiplies by V, 2 copies. A, B, V [64, 64] of a stage are adjacent.

struct ChainSmem {
  struct Stage {
    alignas(1024) Panel<bf16, 64> a, b, v;
  } stages[2];
  alignas(1024) Panel<bf16, 64> p;
  Mbarrier full[2], empty[2], p_full, p_empty;
};

__device__ __forceinline__ void copy_stages(const Operands& p, ChainSmem& smem) {
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % 2];
    const auto* from = static_cast<const bf16*>(p.a) + int64_t{i} * 3 * 64 * 64;
    arch::wait(smem.empty[i % 2], i / 2 % 2 ^ 1);
    copy_panel(stage.a, from, 64, 64, 64);
    copy_panel(stage.b, from + 64 * 64, 64, 64, 64);
    copy_panel(stage.v, from + 2 * 64 * 64, 64, 64, 64);
    arch::commit_copies();
    arch::wait_copies<0>();
    arch::fence_async_proxy();
    arch::arrive(smem.full[i % 2]);
  }
}

__device__ __forceinline__ void form_p(const Operands& p, ChainSmem& smem) {
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % 2];
    float d[32];
    arch::wait(smem.full[i % 2], i / 2 % 2);
    arch::fence_wgmma(d);
    multiply(d, stage.a, stage.b, false);
    arch::commit_wgmma();
    arch::wait_wgmma<0>(d);
    if (arch::thread_idx() == 0) arch::arrive(smem.empty[i % 2]);
    arch::wait(smem.p_empty, i % 2 ^ 1);
#pragma unroll
    for (int n = 0; n < 64; n += 8) {
      store_d(smem.p, warp_idx() * 16, n, reinterpret_cast<const float (&)[4]>(d[n / 2]));
    }
    arch::fence_async_proxy();
    arch::arrive(smem.p_full);
  }
}

__device__ __forceinline__ void multiply_by_v(const Operands& p, ChainSmem& smem) {
  float d[32];
  for (int i = 0; i < p.n; ++i) {
    auto& stage = smem.stages[i % 2];
    arch::wait(smem.p_full, i % 2);  // whoever stored P had waited for the stage
    arch::fence_wgmma(d);
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      arch::wgmma<bf16, Major::kK, Major::kMN>(d, arch::matrix_descriptor(smem.p.data + k, kPattern),
                                               arch::matrix_descriptor(stage.v.data + k * 64, kPattern),
                                               i > 0 || k > 0);
    }
    arch::commit_wgmma();
    arch::wait_wgmma<0>(d);
    if (arch::thread_idx() == 128) {
      arch::arrive(smem.empty[i % 2]);
      arch::arrive(smem.p_empty);
    }
  }
  store_result(static_cast<float*>(p.c), d);
}

__global__ void __launch_bounds__(384, 1) chain_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<ChainSmem>();
  if (arch::thread_idx() == 0) {
    for (int i = 0; i < 2; ++i) arch::init_mbarrier(smem.full[i], 128), arch::init_mbarrier(smem.empty[i], 2);
    arch::init_mbarrier(smem.p_full, 128), arch::init_mbarrier(smem.p_empty, 1);
    arch::fence_mbarrier_init();
  }
  arch::sync_block();
  if (arch::thread_idx() < 128) return form_p(p, smem);
  if (arch::thread_idx() < 256) return multiply_by_v(p, smem);
  copy_stages(p, smem);
}

Status chain(const Operands& p, Stream stream) {
  return launch(KERNEL(chain_kernel), p.num_blocks, 384, sizeof(ChainSmem), stream, p);
}

// ---- c [n, 64] = 2 a, each row reversed, through two slots. One half of the threads fills, the other reads; they
// signal by named barriers, and nobody waits for its own signal.

struct Slots {
  float x[2][64];
  Mbarrier full[2], empty[2];
};

__global__ void __launch_bounds__(128, 1) named_barriers_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<Slots>();
  const int i = arch::thread_idx() % 64, num_rounds = static_cast<int>(p.n);
  const auto full = [](int round) { return 1 + round % 2; };
  const auto empty = [](int round) { return 3 + round % 2; };
  for (int round = 0; round < num_rounds; ++round) {
    float& x = smem.x[round % 2][i];
    if (arch::thread_idx() < 64) {
      if (round >= 2) arch::sync_group(empty(round), 128);
      x = static_cast<const float*>(p.a)[round * 64 + i];
      arch::arrive_group(full(round), 128);
    } else {
      arch::sync_group(full(round), 128);
      static_cast<float*>(p.c)[round * 64 + i] = 2.0f * smem.x[round % 2][63 - i];
      if (round + 2 < num_rounds) arch::arrive_group(empty(round), 128);
    }
  }
}

Status named_barriers(const Operands& p, Stream stream) {
  return launch(KERNEL(named_barriers_kernel), p.num_blocks, 128, sizeof(Slots), stream, p);
}

// The same by mbarriers, at which one lane of each warp arrives and waits.
__global__ void __launch_bounds__(128, 1) elected_lanes_kernel(const __grid_constant__ Operands p) {
  auto& smem = arch::shared_memory<Slots>();
  const int i = arch::thread_idx() % 64;
  if (arch::thread_idx() == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      arch::init_mbarrier(smem.full[slot], 2), arch::init_mbarrier(smem.empty[slot], 2);
    }
    arch::fence_mbarrier_init();
  }
  arch::sync_block();
  const auto wait = [](Mbarrier& bar, int parity) {
    if (lane_idx() == 0) arch::wait(bar, parity);
    arch::sync_warp();
  };
  const auto arrive = [](Mbarrier& bar) {
    arch::sync_warp();
    if (lane_idx() == 0) arch::arrive(bar);
  };
  for (int round = 0; round < p.n; ++round) {
    const int slot = round % 2, parity = round / 2 % 2;
    if (arch::thread_idx() < 64) {
      wait(smem.empty[slot], parity ^ 1);
      smem.x[slot][i] = static_cast<const float*>(p.a)[round * 64 + i];
      arrive(smem.full[slot]);
    } else {
      wait(smem.full[slot], parity);
      static_cast<float*>(p.c)[round * 64 + i] = 2.0f * smem.x[slot][63 - i];
      arrive(smem.empty[slot]);
    }
  }
}

Status elected_lanes(const Operands& p, Stream stream) {
  return launch(KERNEL(elected_lanes_kernel), p.num_blocks, 128, sizeof(Slots), stream, p);
}

constexpr auto kRegisters = From::kRegisters, kShared = From::kShared;
constexpr Major kMajor = Major::kK, kMinor = Major::kMN;

}  // namespace

#define GEMMS(n)                                                               \
  {"wgmma_bf16_registers_k_" #n, gemm<bf16, n, kRegisters, kMajor, kMajor>}, { \
    "wgmma_bf16_registers_n_" #n, gemm<bf16, n, kRegisters, kMajor, kMinor>    \
  }
const Entry kGoodSm90[] = {
    GEMMS(16),
    GEMMS(32),
    GEMMS(48),
    GEMMS(64),
    GEMMS(128),
    GEMMS(256),
    {"wgmma_bf16_k_k_64", gemm<bf16, 64, kShared, kMajor, kMajor>},
    {"wgmma_bf16_k_n_128", gemm<bf16, 128, kShared, kMajor, kMinor>},
    {"wgmma_bf16_m_k_128", gemm<bf16, 128, kShared, kMinor, kMajor>},
    {"wgmma_bf16_m_n_48", gemm<bf16, 48, kShared, kMinor, kMinor>},
    {"wgmma_fp16_registers_n_64", gemm<fp16, 64, kRegisters, kMajor, kMinor>},
    {"wgmma_fp16_m_k_32", gemm<fp16, 32, kShared, kMinor, kMajor>},
    {"two_groups", two_groups},
    {"async_pipeline", async_pipeline},
    {"bulk_pipeline", bulk_pipeline},
    {"chain", chain},
    {"named_barriers", named_barriers},
    {"elected_lanes", elected_lanes},
    {nullptr, nullptr},
};
#undef GEMMS

}  // namespace hypenet::emu_tests
