// Copies, for each sequence, one of the states that a decode step of several draft tokens returned into the
// pool.
//
// Mapping: a task is a sequence and a value head, whose [K, V] is contiguous on both sides.
#include <cstring>

#include "gated_delta_chunk.h"
#include "kernels.h"

namespace hypenet::cpu {

Status commit_states(const CommitStatesParams& p) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64) return "states must be float32 or float64";
  const int64_t element = p.dtype == DType::kFloat64 ? 8 : 4, head_bytes = p.K * p.V * element;
  const int64_t tasks = p.B * p.HV;
  for_each_task(tasks, useful_threads(p.num_threads, tasks, double(p.B) * p.HV * p.K * p.V),
                [&](int64_t task, int64_t) {
                  const int64_t b = task / p.HV, head = task % p.HV;
                  const int64_t slot = p.state_indices.data == nullptr ? b : index_at(p.state_indices, b);
                  const int64_t accepted = index_at(p.num_accepted, b);
                  if (slot < 0 || slot >= p.num_slots || accepted <= 0 || accepted > p.T) return;
                  const char* from = static_cast<const char*>(p.states) +
                                     ((b * p.T + accepted - 1) * p.HV + head) * head_bytes;
                  char* to = static_cast<char*>(p.state) + gated_delta::state_offset(p, b) * element;
                  std::memcpy(to + head * head_bytes, from, head_bytes);
                });
  return nullptr;
}

}  // namespace hypenet::cpu
