// Collectives of a warp: shuffles, ldmatrix, mma. Fragment layouts are documented in cuda/arch/sm80.cuh.
#include <algorithm>

#include "products.h"
#include "state.h"

namespace hypenet::emu {
namespace {

struct Shuffle {
  std::byte* value;
  size_t bytes;
  int source;
};

struct Fragments {
  float (*d)[4];
  const uint32_t *a, *b;
};

struct Rows {
  uint32_t (*r)[4];
  const void* row;
};

template <class Operands>
const Operands& operands(const Warp& warp, int lane) {
  return *static_cast<const Operands*>(warp.collective.operands[lane]);
}

void exchange(Warp& warp) {
  std::byte values[kWarpSize][16];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& s = operands<Shuffle>(warp, lane);
    std::memcpy(values[lane], s.value, s.bytes);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& s = operands<Shuffle>(warp, lane);
    std::memcpy(s.value, values[s.source], s.bytes);
  }
}

// Eight rows of 16 bytes are read without conflict if they are in different groups of four banks.
void count_banks(const Warp& warp, int matrix) {
  uintptr_t rows[8];
  int ways[8] = {};
  for (int i = 0; i < 8; ++i) rows[i] = reinterpret_cast<uintptr_t>(operands<Rows>(warp, matrix * 8 + i).row);
  for (int i = 0; i < 8; ++i) {
    if (std::find(rows, rows + i, rows[i]) == rows + i) ++ways[rows[i] / 16 % 8];
  }
  machine.ldmatrix.accesses += 1;
  machine.ldmatrix.ways += *std::max_element(ways, ways + 8);
}

template <bool kTransposed>
void load_matrices(Warp& warp) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    std::memcpy(matrices[lane / 8][lane % 8], operands<Rows>(warp, lane).row, 16);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t (&r)[4] = *operands<Rows>(warp, lane).r;
    const int row = lane / 4, col = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& x = matrices[i];
      const uint16_t low = kTransposed ? x[col][row] : x[row][col];
      const uint16_t high = kTransposed ? x[col + 1][row] : x[row][col + 1];
      r[i] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
  for (int i = 0; i < 4; ++i) count_banks(warp, i);
}

template <int kDepth>
void multiply(const Warp& warp, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  constexpr int kTerms = kDepth / 2;  // added at once
  float d[16][8];
  const auto for_each_result = [&](auto&& run) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      float (&own)[4] = *operands<Fragments>(warp, lane).d;
      const int row = lane / 4, col = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) run(own[i], d[row + i / 2 * 8][col + i % 2]);
    }
  };
  for_each_result([](const float& own, float& x) { x = own; });
  for (int m = 0; m < 16; ++m) {
    for (int first = 0; first < kDepth; first += kTerms) {
      float terms[kTerms][8];
      for (int i = 0; i < kTerms; ++i) {
        for (int n = 0; n < 8; ++n) terms[i][n] = a[m][first + i] * b[first + i][n];
      }
      add_products(d[m], terms);
    }
  }
  for_each_result([](float& own, const float& x) { own = x; });
}

template <class Element>
void multiply_16x8x16(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& f = operands<Fragments>(warp, lane);
    const int row = lane / 4, col = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int m = row + i % 2 * 8, k = col + i / 2 * 8;
      widen_pair<Element>(f.a[i], a[m][k], a[m][k + 1]);
    }
    for (int i = 0; i < 2; ++i) widen_pair<Element>(f.b[i], b[col + 8 * i][row], b[col + 8 * i + 1][row]);
  }
  multiply(warp, a, b);
}

void multiply_16x8x8_tf32(Warp& warp) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& f = operands<Fragments>(warp, lane);
    const int row = lane / 4, col = lane % 4;
    for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][col + i / 2 * 4] = std::bit_cast<float>(f.a[i] & ~0x1fffu);
    for (int i = 0; i < 2; ++i) b[col + 4 * i][row] = std::bit_cast<float>(f.b[i] & ~0x1fffu);
  }
  multiply(warp, a, b);
}

void check_tf32(const char* operand, const uint32_t* values, int count) {
  for (int i = 0; i < count; ++i) {
    const float x = std::bit_cast<float>(values[i]);
    if ((values[i] & 0x1fff) != 0 && x == x) {
      fail("mma_16x8x8_tf32: " + std::string(operand) + "[" + std::to_string(i) +
           "] is not rounded by to_tf32");
    }
  }
}

}  // namespace

void shuffle(const char* what, void* value, size_t bytes, int source) {
  Shuffle operands{static_cast<std::byte*>(value), bytes, source};
  if (bytes > 16) fail(std::string(what) + ": values have at most 16 bytes, got " + std::to_string(bytes));
  if (source < 0 || source >= kWarpSize) fail(std::string(what) + ": no lane " + std::to_string(source));
  collective(what, &operands, exchange);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  const char* what = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  Rows operands{&r, row};
  if (!is_shared(row)) fail(std::string(what) + ": the row does not lie in shared memory");
  const uint32_t offset = shared_offset(row);
  if (offset % 16 != 0) {
    fail(std::string(what) + ": misaligned row at shared + " + std::to_string(offset) +
         ", not a multiple of 16");
  }
  check_shared(offset, 16, Access::kRead);
  if (registers_watched) check_registers(r, sizeof r, Access::kWrite);
  collective(what, &operands, transposed ? load_matrices<true> : load_matrices<false>);
}

void mma(Product product, float (&d)[4], const uint32_t* a, const uint32_t* b) {
  Fragments operands{&d, a, b};
  if (registers_watched) check_registers(d, sizeof d, Access::kWrite);
  switch (product) {
    case Product::kBFloat16:
      return collective("mma_16x8x16<bf16>", &operands, multiply_16x8x16<bf16>);
    case Product::kFloat16:
      return collective("mma_16x8x16<fp16>", &operands, multiply_16x8x16<fp16>);
    case Product::kTF32:
      check_tf32("a", a, 4);
      check_tf32("b", b, 2);
      return collective("mma_16x8x8_tf32", &operands, multiply_16x8x8_tf32);
  }
}

}  // namespace hypenet::emu
