#include "commit_states.cuh"
#include "kernels.h"
#include "launch.h"

namespace hypenet::cuda {
namespace {

using namespace states;

template <class Word>
Status launch_commit(const CommitStatesParams& params, Stream stream) {
  return launch(KERNEL(states::commit_states_kernel, Word), params.B * blocks_of_state<Word>(params),
                kThreads, 0, stream, params);
}

}  // namespace

Status commit_states(const CommitStatesParams& params, Stream stream) {
  if (params.dtype != DType::kFloat32 && params.dtype != DType::kFloat64) {
    return "states must be float32 or float64";
  }
  const int64_t sizes = state_bytes(params) | slot_stride(params) * element_bytes(params);
  const auto addresses =
      reinterpret_cast<uintptr_t>(params.state) | reinterpret_cast<uintptr_t>(params.states);
  return sizes % 16 == 0 && addresses % 16 == 0 ? launch_commit<uint4>(params, stream)
                                                : launch_commit<uint32_t>(params, stream);
}

}  // namespace hypenet::cuda
