// RMSNorm with what precedes or follows it in a decoder layer: rotary embedding, output gate, residual connection.
//
// Math, of a row x of D elements:  r = 1 / sqrt(sum_j x_j^2 / D + eps);  n_j = r x_j weight_j
//   rms_norm_rope:   y = n, or with h = D / 2 and j < h: y_j = n_j cos_j - n_{j+h} sin_j,
//                    y_{j+h} = n_{j+h} cos_{j+h} + n_j sin_{j+h}; without weight n = x
//   rms_norm_gated:  y = n act(g), act(g) = s or g s, s = sigmoid(g)
//   add_rms_norm:    sum = x + residual;  y = n of the row sum, as it is rounded
// Backward, for dn = dL / dn and c = r^2 / D sum_j dn_j weight_j x_j:
//   dx_j = r (dn_j weight_j - c x_j);  dweight_j = sum over the rows of dn_j r x_j
// The backward reads the inputs again (add_rms_norm: the sum) and computes r anew, so the forward saves nothing else.
//
// Mapping: a task is a block of kNormBlock rows. A row is read in vectors, once for r and once more for the rest, when
// it is in L1; dn and what all rows share are in scratch rows of the accumulation type. The split is fixed, and dweight
// is added up block by block in order: results do not depend on the number of threads. Numerics: everything but loads
// and stores in the accumulation type; exp of nothing positive. Cost: one read of each input and one write of each
// output: bound by memory.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "dtype.h"
#include "elementwise.h"
#include "kernels.h"
#include "simd.h"
#include "workspace.h"

namespace hypenet::cpu {
namespace {

// Row `row` of a [rows, D] tensor of a dtype that is known at run time.
template <class T>
void load_row(const void* rows, DType dtype, int64_t row, int64_t D, T* __restrict to) {
  dispatch_dtype(dtype, [&]<class Element>() -> Status {
    using Wide = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    const Element* from = static_cast<const Element*>(rows) + row * D;
    for (int64_t j = 0; j < D; ++j) to[j] = static_cast<T>(static_cast<Wide>(from[j]));
    return nullptr;
  });
}

template <class T>
void store_row(const T* __restrict from, int64_t row, int64_t D, DType dtype, void* rows) {
  dispatch_dtype(dtype, [&]<class Element>() -> Status {
    using Wide = std::conditional_t<std::is_same_v<Element, double>, double, float>;
    Element* to = static_cast<Element*>(rows) + row * D;
    for (int64_t j = 0; j < D; ++j) to[j] = static_cast<Element>(static_cast<Wide>(from[j]));
    return nullptr;
  });
}

// A thread's part of a call: scratch rows, and the arithmetic of the norm on rows of Element.
template <class Element>
class Norm {
 public:
  using T = acc_t<Element>;
  static constexpr int64_t kRows = 6;
  T *weight, *cos, *sin, *dn, *other, *dweight;  // weight is 1 where the call has none

  // Vectors that begin in a row may end in the next one, whose zeros take no part in a result.
  static int64_t width(int64_t D) { return (D + 2 * kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  Norm(const RmsNormOperands& p, T* scratch) : p_(p) {
    std::fill_n(scratch, kRows * width(p.D), T(0));
    for (T** row : {&weight, &cos, &sin, &dn, &other, &dweight}) {
      *row = scratch;
      scratch += width(p.D);
    }
    if (p.weight == nullptr) {
      std::fill_n(weight, p.D, T(1));
    } else {
      load_row(p.weight, p.weight_dtype, 0, p.D, weight);
    }
  }

  const Element* row(const void* x, int64_t i) const { return static_cast<const Element*>(x) + i * p_.D; }
  Element* row(void* x, int64_t i) const { return static_cast<Element*>(x) + i * p_.D; }

  // 1 / sqrt(mean(x^2) + eps)
  T reciprocal_rms(const Element* x) const {
    vec<T> squares{};
    for_vectors<T>(p_.D, [&](int64_t j, int64_t n) {
      const vec<T> x_j = read<T>(x + j, n);
      squares += x_j * x_j;
    });
    return 1 / std::sqrt(sum<T>(squares) / T(p_.D) + T(p_.eps));
  }

  // n_j
  HYPENET_INLINE vec<T> normalized(const Element* x, T r, int64_t j, int64_t n) const {
    return read<T>(x + j, n) * r * load(weight + j);
  }

  // Passes dx to emit(j, n, dx_j) and adds to dweight; dn is set.
  template <class Emit>
  HYPENET_INLINE void differentiate(const Element* x, T r, const Emit& emit) const {
    vec<T> products{};
    for_vectors<T>(p_.D, [&](int64_t j, int64_t n) {
      products += read<T>(dn + j, n) * load(weight + j) * read<T>(x + j, n);
    });
    const T c = r * r * sum<T>(products) / T(p_.D);
    for_vectors<T>(p_.D, [&](int64_t j, int64_t n) {
      const vec<T> x_j = read<T>(x + j, n), dn_j = read<T>(dn + j, n);
      store(dweight + j, load(dweight + j) + dn_j * (r * x_j));
      emit(j, n, r * (dn_j * load(weight + j) - c * x_j));
    });
  }

 private:
  const RmsNormOperands& p_;
};

int64_t num_blocks(const RmsNormOperands& p) { return (p.rows + kNormBlock - 1) / kNormBlock; }

// run(norm, row) for every row, on any thread; then dweight, if it is wanted.
template <class Element, class Run>
void for_each_row(const RmsNormOperands& p, const Run& run) {
  using T = acc_t<Element>;
  const int64_t blocks = num_blocks(p), scratch_size = Norm<Element>::kRows * Norm<Element>::width(p.D);
  const int64_t threads = useful_threads(p.num_threads, blocks, 4.0 * p.rows * p.D);
  const ThreadBlocks<T> scratch(threads, scratch_size);
  for_each_task(blocks, threads, [&](int64_t block, int64_t thread) {
    const Norm<Element> norm(p, scratch.thread(thread));
    const int64_t stop = std::min((block + 1) * kNormBlock, p.rows);
    for (int64_t row = block * kNormBlock; row < stop; ++row) run(norm, row);
    if (p.partials != nullptr) std::copy_n(norm.dweight, p.D, static_cast<T*>(p.partials) + block * p.D);
  });
  if (p.partials == nullptr) return;
  T* dweight = static_cast<T*>(p.dweight);
  std::fill_n(dweight, p.D, T(0));
  for (int64_t block = 0; block < blocks; ++block) {
    const T* partial = static_cast<const T*>(p.partials) + block * p.D;
    for (int64_t j = 0; j < p.D; ++j) dweight[j] += partial[j];
  }
}

// run.operator()<Element>(), for the dtype of the call.
template <class Run>
Status dispatch(const RmsNormOperands& p, Run&& run) {
  if (p.partials != nullptr && p.num_blocks != num_blocks(p)) {
    return "partials must have a row for every block of rows";
  }
  return dispatch_dtype(p.dtype, [&]<class Element>() -> Status {
    run.template operator()<Element>();
    return nullptr;
  });
}

// Loads the angles of a row's token, which its heads share.
template <class Element>
void load_angles(const RmsNormRopeOperands& p, const Norm<Element>& norm, int64_t row) {
  if (row % p.H != 0 && row % kNormBlock != 0) return;
  const int64_t token = row / p.H, at = p.shared_angles ? token % p.T : token;
  load_row(p.cos, p.angle_dtype, at, p.D, norm.cos);
  load_row(p.sin, p.angle_dtype, at, p.D, norm.sin);
}

}  // namespace

Status rms_norm_rope_fwd(const RmsNormRopeFwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element* x = norm.row(p.x, row);
      Element* y = norm.row(p.y, row);
      const T r = p.weight == nullptr ? 1 : norm.reciprocal_rms(x);
      if (p.cos == nullptr) {
        for_vectors<T>(p.D, [&](int64_t j, int64_t n) { write<T>(y + j, norm.normalized(x, r, j, n), n); });
        return;
      }
      load_angles(p, norm, row);
      for_vectors<T>(p.D / 2, [&](int64_t j, int64_t n) {
        const int64_t k = j + p.D / 2;
        const vec<T> first = norm.normalized(x, r, j, n), second = norm.normalized(x, r, k, n);
        write<T>(y + j, first * load(norm.cos + j) - second * load(norm.sin + j), n);
        write<T>(y + k, second * load(norm.cos + k) + first * load(norm.sin + k), n);
      });
    });
  });
}

Status rms_norm_rope_bwd(const RmsNormRopeBwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element *x = norm.row(p.x, row), *dy = norm.row(p.dy, row);
      Element* dx = norm.row(p.dx, row);
      if (p.cos == nullptr) {
        for_vectors<T>(p.D, [&](int64_t j, int64_t n) { write<T>(norm.dn + j, read<T>(dy + j, n), n); });
      } else {
        load_angles(p, norm, row);
        for_vectors<T>(p.D / 2, [&](int64_t j, int64_t n) {
          const int64_t k = j + p.D / 2;
          const vec<T> first = read<T>(dy + j, n), second = read<T>(dy + k, n);
          write<T>(norm.dn + j, first * load(norm.cos + j) + second * load(norm.sin + k), n);
          write<T>(norm.dn + k, second * load(norm.cos + k) - first * load(norm.sin + j), n);
        });
      }
      if (p.weight == nullptr) {
        for_vectors<T>(p.D, [&](int64_t j, int64_t n) { write<T>(dx + j, read<T>(norm.dn + j, n), n); });
        return;
      }
      norm.differentiate(x, norm.reciprocal_rms(x),
                         [&](int64_t j, int64_t n, vec<T> dx_j) { write<T>(dx + j, dx_j, n); });
    });
  });
}

Status rms_norm_gated_fwd(const RmsNormGatedFwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element *x = norm.row(p.x, row), *g = norm.row(p.g, row);
      Element* y = norm.row(p.y, row);
      const T r = norm.reciprocal_rms(x);
      for_vectors<T>(p.D, [&](int64_t j, int64_t n) {
        const vec<T> g_j = read<T>(g + j, n), s = sigmoid<T>(g_j);
        write<T>(y + j, norm.normalized(x, r, j, n) * (p.silu ? g_j * s : s), n);
      });
    });
  });
}

Status rms_norm_gated_bwd(const RmsNormGatedBwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element *x = norm.row(p.x, row), *g = norm.row(p.g, row), *dy = norm.row(p.dy, row);
      Element *dx = norm.row(p.dx, row), *dg = norm.row(p.dg, row);
      const T r = norm.reciprocal_rms(x);
      for_vectors<T>(p.D, [&](int64_t j, int64_t n) {
        const vec<T> g_j = read<T>(g + j, n), dy_j = read<T>(dy + j, n), s = sigmoid<T>(g_j);
        const vec<T> slope = p.silu ? s * (1 + g_j * (1 - s)) : s * (1 - s);
        write<T>(dg + j, dy_j * norm.normalized(x, r, j, n) * slope, n);
        write<T>(norm.dn + j, dy_j * (p.silu ? g_j * s : s), n);
      });
      norm.differentiate(x, r, [&](int64_t j, int64_t n, vec<T> dx_j) { write<T>(dx + j, dx_j, n); });
    });
  });
}

Status add_rms_norm_fwd(const AddRmsNormFwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element* residual = norm.row(p.residual, row);
      Element *total = norm.row(p.sum, row), *y = norm.row(p.y, row);
      load_row(p.x, p.x_dtype, row, p.D, norm.other);
      for_vectors<T>(p.D, [&](int64_t j, int64_t n) {
        write<T>(total + j, load(norm.other + j) + read<T>(residual + j, n), n);
      });
      const T r = norm.reciprocal_rms(total);
      for_vectors<T>(p.D, [&](int64_t j, int64_t n) { write<T>(y + j, norm.normalized(total, r, j, n), n); });
    });
  });
}

Status add_rms_norm_bwd(const AddRmsNormBwdParams& p) {
  return dispatch(p, [&]<class Element>() {
    using T = acc_t<Element>;
    for_each_row<Element>(p, [&](const Norm<Element>& norm, int64_t row) {
      const Element *total = norm.row(p.sum, row), *dsum = norm.row(p.dsum, row), *dy = norm.row(p.dy, row);
      Element* dresidual = norm.row(p.dresidual, row);
      for_vectors<T>(p.D, [&](int64_t j, int64_t n) { write<T>(norm.dn + j, read<T>(dy + j, n), n); });
      norm.differentiate(total, norm.reciprocal_rms(total), [&](int64_t j, int64_t n, vec<T> dx_j) {
        const vec<T> d = dx_j + read<T>(dsum + j, n);
        write<T>(dresidual + j, d, n);
        if (p.dx != nullptr) write<T>(norm.other + j, d, n);
      });
      if (p.dx != nullptr) store_row(norm.other, row, p.D, p.x_dtype, p.dx);
    });
  });
}

}  // namespace hypenet::cpu
