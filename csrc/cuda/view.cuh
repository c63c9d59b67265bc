// How kernels read what params.h describes.
#pragma once

#include "../params.h"
#include "arch/sm80.cuh"

namespace hypenet::cuda {

using arch::from_float;
using arch::to_float;

// The row of a token and head in a [B, T, heads, dim] tensor, or the element of a [B, T, heads] one.
template <class Element>
__device__ __forceinline__ Element* row_of(const View& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<Element*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

__device__ __forceinline__ int64_t index_at(const Indices& x, int64_t i) {
  return x.is_int32 ? static_cast<const int32_t*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

// Elements between the states of a pool, or of sequences that have one each.
template <class Params>
__host__ __device__ __forceinline__ int64_t slot_stride(const Params& params) {
  return params.slot_stride == 0 ? params.HV * params.K * params.V : params.slot_stride;
}

// The slot of sequence n: itself without state_indices, -1 to skip it, num_slots or more where there is none.
template <class Params>
__device__ __forceinline__ int64_t slot_of(const Params& params, int64_t n) {
  return params.state_indices.data == nullptr ? n : index_at(params.state_indices, n);
}

}  // namespace hypenet::cuda
