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
// Mapping: a task is a block of kNormBlock rows; it widens its rows, one at a time, into scratch that stays in L1. The
// split is fixed, and dweight is added up block by block in order: results do not depend on the number of threads.
// Scratch rows are padded with zeros to whole vectors. Numerics: everything but loads and stores in the accumulation
// type; exp of nothing positive. Cost: one read of each input and one write of each output: bound by memory.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "convert.h"
#include "dtype.h"
#include "kernels.h"
#include "simd.h"
#include "workspace.h"

namespace hypenet::cpu {
namespace {

// Row `row` of a [rows, D] tensor of any dtype.
template <class T>
void load_row(const void* rows, DType dtype, int64_t row, int64_t D, T* __restrict to) {
  dispatch_dtype(dtype, [&]<class Element>() -> Status {
    const Element* from = static_cast<const Element*>(rows) + row * D;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<Element, double>) {
      convert_row(from, D, to);
    } else {
      for (int64_t j = 0; j < D; ++j) to[j] = static_cast<float>(from[j]);
    }
    return nullptr;
  });
}

template <class T>
void store_row(const T* __restrict from, int64_t row, int64_t D, DType dtype, void* rows) {
  dispatch_dtype(dtype, [&]<class Element>() -> Status {
    Element* to = static_cast<Element*>(rows) + row * D;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<Element, double>) {
      convert_row(from, D, to);
    } else {
      for (int64_t j = 0; j < D; ++j) to[j] = Element(static_cast<float>(from[j]));
    }
    return nullptr;
  });
}

// The scratch rows of a thread, and what all rows of a call share.
template <class T>
class Norm {
 public:
  static constexpr int64_t kRows = 8;  // of scratch: those below, and the sums of dweight
  T *x, *n, *weight, *cos, *sin, *gate, *slope, *dweight;

  static int64_t padded(int64_t D) { return (D + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  Norm(const RmsNormOperands& p, T* scratch) : p_(p), D_(p.D), width_(padded(p.D)) {
    std::fill_n(scratch, kRows * width_, T(0));
    for (T** row : {&x, &n, &weight, &cos, &sin, &gate, &slope, &dweight}) {
      *row = scratch;
      scratch += width_;
    }
    if (p.weight != nullptr) load_row(p.weight, p.weight_dtype, 0, D_, weight);
  }

  // 1 / sqrt(mean(x^2) + eps)
  T reciprocal_rms() const { return 1 / std::sqrt(dot(x, x) / T(D_) + T(p_.eps)); }

  // n = r x weight
  void normalize(T r) {
    for (int64_t j = 0; j < width_; ++j) n[j] = r * x[j] * weight[j];
  }

  // x = dx, from dn in n; adds to dweight.
  void differentiate(T r) {
    for (int64_t j = 0; j < width_; ++j) dweight[j] += n[j] * (r * x[j]);
    for (int64_t j = 0; j < width_; ++j) n[j] *= weight[j];
    const T c = r * r * dot(n, x) / T(D_);
    for (int64_t j = 0; j < width_; ++j) x[j] = r * (n[j] - c * x[j]);
  }

  // gate = act(g) and slope = act'(g), from g in gate.
  void activate(bool silu) {
    for (int64_t j = 0; j < width_; ++j) slope[j] = -std::abs(gate[j]);
    exp_in_place(slope, width_);
    for (int64_t j = 0; j < width_; ++j) {
      const T g = gate[j], part = 1 / (1 + slope[j]), s = g < 0 ? slope[j] * part : part;
      gate[j] = silu ? g * s : s;
      slope[j] = silu ? s * (1 + g * (1 - s)) : s * (1 - s);
    }
  }

 private:
  T dot(const T* a, const T* b) const {
    vec<T> even{}, odd{};
    int64_t j = 0;
    for (; j + 2 * kLanes<T> <= width_; j += 2 * kLanes<T>) {
      even += load(a + j) * load(b + j);
      odd += load(a + j + kLanes<T>) * load(b + j + kLanes<T>);
    }
    if (j < width_) even += load(a + j) * load(b + j);
    return sum<T>(even + odd);
  }

  const RmsNormOperands& p_;
  const int64_t D_, width_;
};

int64_t num_blocks(const RmsNormOperands& p) { return (p.rows + kNormBlock - 1) / kNormBlock; }

// run(norm, row) for every row, on any thread.
template <class T, class Run>
void for_each_row(const RmsNormOperands& p, const Run& run) {
  const int64_t width = Norm<T>::padded(p.D), blocks = num_blocks(p);
  const int64_t threads = useful_threads(p.num_threads, blocks, 4.0 * p.rows * p.D);
  const ThreadBlocks<T> scratch(threads, Norm<T>::kRows * width);
  for_each_task(blocks, threads, [&](int64_t block, int64_t thread) {
    Norm<T> norm(p, scratch.thread(thread));
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

// Calls run.operator()<T>() with the accumulation type.
template <class Run>
Status dispatch(const RmsNormOperands& p, Run&& run) {
  if (p.partials != nullptr && p.num_blocks != num_blocks(p)) {
    return "partials must have a row for every block of rows";
  }
  return dispatch_dtype(p.dtype, [&]<class Element>() -> Status {
    run.template operator()<acc_t<Element>>();
    return nullptr;
  });
}

// Loads the tables of a row's token, which its heads share.
template <class T>
void load_angles(const RmsNormRopeOperands& p, Norm<T>& norm, int64_t row) {
  const int64_t token = row / p.H;
  if (row % p.H != 0 && row % kNormBlock != 0) return;
  const int64_t at = p.shared_angles ? token % p.T : token;
  load_row(p.cos, p.angle_dtype, at, p.D, norm.cos);
  load_row(p.sin, p.angle_dtype, at, p.D, norm.sin);
}

template <class T>
void rotate(int64_t half, const Norm<T>& norm, T* __restrict first, T* __restrict second) {
  const T* __restrict cos = norm.cos, * __restrict sin = norm.sin;
  for (int64_t j = 0; j < half; ++j) {
    const T a = first[j], b = second[j];
    first[j] = a * cos[j] - b * sin[j];
    second[j] = b * cos[j + half] + a * sin[j + half];
  }
}

template <class T>
void rotate_back(int64_t half, const Norm<T>& norm, T* __restrict first, T* __restrict second) {
  const T* __restrict cos = norm.cos, * __restrict sin = norm.sin;
  for (int64_t j = 0; j < half; ++j) {
    const T a = first[j], b = second[j];
    first[j] = a * cos[j] + b * sin[j + half];
    second[j] = b * cos[j + half] - a * sin[j];
  }
}

}  // namespace

Status rms_norm_rope_fwd(const RmsNormRopeFwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      T* y = norm.x;
      load_row(p.x, p.dtype, row, p.D, norm.x);
      if (p.weight != nullptr) {
        norm.normalize(norm.reciprocal_rms());
        y = norm.n;
      }
      if (p.cos != nullptr) {
        load_angles(p, norm, row);
        rotate(p.D / 2, norm, y, y + p.D / 2);
      }
      store_row(y, row, p.D, p.dtype, p.y);
    });
  });
}

Status rms_norm_rope_bwd(const RmsNormRopeBwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      T* dn = norm.n;
      load_row(p.dy, p.dtype, row, p.D, dn);
      if (p.cos != nullptr) {
        load_angles(p, norm, row);
        rotate_back(p.D / 2, norm, dn, dn + p.D / 2);
      }
      if (p.weight == nullptr) return store_row(dn, row, p.D, p.dtype, p.dx);
      load_row(p.x, p.dtype, row, p.D, norm.x);
      norm.differentiate(norm.reciprocal_rms());
      store_row(norm.x, row, p.D, p.dtype, p.dx);
    });
  });
}

Status rms_norm_gated_fwd(const RmsNormGatedFwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      load_row(p.x, p.dtype, row, p.D, norm.x);
      load_row(p.g, p.dtype, row, p.D, norm.gate);
      norm.normalize(norm.reciprocal_rms());
      norm.activate(p.silu);
      for (int64_t j = 0; j < p.D; ++j) norm.n[j] *= norm.gate[j];
      store_row(norm.n, row, p.D, p.dtype, p.y);
    });
  });
}

Status rms_norm_gated_bwd(const RmsNormGatedBwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      T* dy = norm.cos;  // there is no rotation
      load_row(p.x, p.dtype, row, p.D, norm.x);
      load_row(p.g, p.dtype, row, p.D, norm.gate);
      load_row(p.dy, p.dtype, row, p.D, dy);
      const T r = norm.reciprocal_rms();
      norm.normalize(r);
      norm.activate(p.silu);
      for (int64_t j = 0; j < p.D; ++j) norm.slope[j] *= dy[j] * norm.n[j];
      store_row(norm.slope, row, p.D, p.dtype, p.dg);
      for (int64_t j = 0; j < p.D; ++j) norm.n[j] = dy[j] * norm.gate[j];
      norm.differentiate(r);
      store_row(norm.x, row, p.D, p.dtype, p.dx);
    });
  });
}

Status add_rms_norm_fwd(const AddRmsNormFwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      load_row(p.x, p.x_dtype, row, p.D, norm.x);
      load_row(p.residual, p.dtype, row, p.D, norm.n);
      for (int64_t j = 0; j < p.D; ++j) norm.x[j] += norm.n[j];
      store_row(norm.x, row, p.D, p.dtype, p.sum);
      load_row(p.sum, p.dtype, row, p.D, norm.x);
      norm.normalize(norm.reciprocal_rms());
      store_row(norm.n, row, p.D, p.dtype, p.y);
    });
  });
}

Status add_rms_norm_bwd(const AddRmsNormBwdParams& p) {
  return dispatch(p, [&]<class T>() {
    for_each_row<T>(p, [&](Norm<T>& norm, int64_t row) {
      T* dsum = norm.gate;
      load_row(p.sum, p.dtype, row, p.D, norm.x);
      load_row(p.dy, p.dtype, row, p.D, norm.n);
      load_row(p.dsum, p.dtype, row, p.D, dsum);
      norm.differentiate(norm.reciprocal_rms());
      for (int64_t j = 0; j < p.D; ++j) norm.x[j] += dsum[j];
      store_row(norm.x, row, p.D, p.dtype, p.dresidual);
      if (p.dx != nullptr) store_row(norm.x, row, p.D, p.x_dtype, p.dx);
    });
  });
}

}  // namespace hypenet::cpu
