// A thread's place in its block, and sums over the lanes of a warp.
#pragma once

#include "arch/sm80.cuh"

namespace hypenet::cuda {

__device__ __forceinline__ int lane_idx() {
  return static_cast<unsigned>(arch::thread_idx()) % arch::kWarpSize;
}
__device__ __forceinline__ int warp_idx() {
  return static_cast<unsigned>(arch::thread_idx()) / arch::kWarpSize;
}

// Sum over this lane and those below it.
template <class T>
__device__ __forceinline__ T sum_up_to_lane(T x) {
  const int lane = lane_idx();
#pragma unroll
  for (int delta = 1; delta < arch::kWarpSize; delta *= 2) {
    const T below = arch::shuffle_up(x, delta);
    if (lane >= delta) x += below;
  }
  return x;
}

// Sum over the lanes below this one, from sum = sum_up_to_lane(x).
__device__ __forceinline__ float sum_below_lane(float sum) {
  const float below = arch::shuffle_up(sum, 1);
  return lane_idx() == 0 ? 0.0f : below;
}

}  // namespace hypenet::cuda
