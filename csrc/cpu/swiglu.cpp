// The gated activation of an MLP: forward and backward.
//
// Math, with s = sigmoid(x):  z = x s y;  dx = dz y s (1 + x (1 - s));  dy = dz x s
//
// Mapping: a task is a block of elements. Numerics: arithmetic in the accumulation type, rounded once; exp of nothing
// positive. Cost: one read of each input and one write of each output: bound by memory.
#include <algorithm>

#include "dtype.h"
#include "elementwise.h"
#include "kernels.h"
#include "workspace.h"

namespace hypenet::cpu {
namespace {

constexpr int64_t kBlock = 8192;  // elements

// body.operator()<Element>(first, n) for every block [first, first + n) of the call's elements.
template <class Body>
Status for_blocks(const SwigluOperands& p, const Body& body) {
  return dispatch_dtype(p.dtype, [&]<class Element>() -> Status {
    const int64_t tasks = (p.size + kBlock - 1) / kBlock;
    for_each_task(tasks, useful_threads(p.num_threads, tasks, 16.0 * p.size), [&](int64_t task, int64_t) {
      body.template operator()<Element>(task * kBlock, std::min(kBlock, p.size - task * kBlock));
    });
    return nullptr;
  });
}

}  // namespace

Status swiglu_fwd(const SwigluFwdParams& p) {
  return for_blocks(p, [&]<class Element>(int64_t first, int64_t size) {
    using T = acc_t<Element>;
    const Element *x = static_cast<const Element*>(p.x) + first,
                  *y = static_cast<const Element*>(p.y) + first;
    Element* z = static_cast<Element*>(p.z) + first;
    for_vectors<T>(size, [&](int64_t j, int64_t n) {
      const vec<T> x_j = read<T>(x + j, n);
      write<T>(z + j, x_j * sigmoid<T>(x_j) * read<T>(y + j, n), n);
    });
  });
}

Status swiglu_bwd(const SwigluBwdParams& p) {
  return for_blocks(p, [&]<class Element>(int64_t first, int64_t size) {
    using T = acc_t<Element>;
    const Element *x = static_cast<const Element*>(p.x) + first,
                  *y = static_cast<const Element*>(p.y) + first;
    const Element* dz = static_cast<const Element*>(p.dz) + first;
    Element *dx = static_cast<Element*>(p.dx) + first, *dy = static_cast<Element*>(p.dy) + first;
    for_vectors<T>(size, [&](int64_t j, int64_t n) {
      const vec<T> x_j = read<T>(x + j, n), dz_j = read<T>(dz + j, n), s = sigmoid<T>(x_j);
      write<T>(dx + j, dz_j * read<T>(y + j, n) * (s * (1 + x_j * (1 - s))), n);
      write<T>(dy + j, dz_j * (x_j * s), n);
    });
  });
}

}  // namespace hypenet::cpu
