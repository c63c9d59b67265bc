// cuda/launch.cuh on the host: the same functions, executed by the emulated machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "machine.h"

namespace hypenet::cuda {

inline Status num_processors(int& count) {
  count = emu::num_processors();
  return nullptr;
}

inline Status max_shared_bytes(int& bytes) {
  bytes = emu::max_shared_bytes();
  return nullptr;
}

// Gives a thread its copy of the parameters. They are in host memory, which is not checked.
template <class Params>
[[gnu::noinline]] __attribute__((no_sanitize("thread"))) void call_kernel(const void* kernel,
                                                                          const void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

template <class Params>
Status launch(const char* name, void (*kernel)(Params), int64_t num_blocks, int num_threads,
              size_t shared_bytes, Stream, const Params& params) {
  if (num_blocks == 0) return nullptr;
  if (num_blocks > std::numeric_limits<int32_t>::max()) return "too many blocks for one launch";
  return emu::run({name, reinterpret_cast<const void*>(kernel), call_kernel<Params>, &params, num_blocks,
                   num_threads, shared_bytes});
}

}  // namespace hypenet::cuda
