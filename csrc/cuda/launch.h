// The one way by which a kernel is started, and what the host knows of a device. Three modules share the launchers:
// one is linked with kernels that nvcc compiled, one compiles them at first use (rtc/), one emulates them (../emu).
//
//   launch(KERNEL(gated_delta::fill::gated_delta_fill_kernel, Params), num_blocks, num_threads, shared_bytes, stream,
//          params)
//
// KERNEL names a kernel from namespace hypenet::cuda on, and then its template arguments, which are types. It is used
// in x.cu for the kernels of x.cuh. All blocks lie along x, so that the number of sequences is bounded by 2^31 - 1
// blocks alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "../params.h"
#include "kernels.h"

namespace hypenet::cuda {

// The size of a launch.
struct Size {
  int64_t num_blocks;
  int num_threads;
  size_t shared_bytes;  // of a block
};

// Properties of a device that launchers choose by.
struct Device {
  int num_processors;    // SMs
  int max_shared_bytes;  // that a block can ask for
};

constexpr int kMaxDevices = 64;

// "gated_delta_fill_kernel" from "gated_delta::fill::gated_delta_fill_kernel"
constexpr const char* last_name(const char* qualified) {
  const char* name = qualified;
  for (const char* c = qualified; *c != 0; ++c) {
    if (*c == ':') name = c + 1;
  }
  return name;
}

// The message that a kernel of this name could not be launched; it stays as it is until the thread's next one. Made
// without <string>, which would cost every nvcc compilation of a launcher two seconds.
inline Status launch_error(const char* qualified, const Size& size, const char* why) {
  static thread_local char message[1024];
  std::snprintf(message, sizeof message, "%s: %s (%lld blocks of %d threads and %zu bytes of shared memory)",
                last_name(qualified), why, static_cast<long long>(size.num_blocks), size.num_threads,
                size.shared_bytes);
  return message;
}

inline Status too_much_shared_memory(const char* qualified, const Size& size, int most) {
  char why[128];
  std::snprintf(why, sizeof why,
                "a block of this GPU has %d bytes of shared memory, less shared memory than the kernel needs",
                most);
  return launch_error(qualified, size, why);
}

}  // namespace hypenet::cuda

#if HYPENET_EMULATED
#include "../emu/launch.h"
#elif defined(__CUDACC__)
#include "launch_ahead.h"
#else
#include "rtc/launch.h"
#endif

namespace hypenet::cuda {

template <class Params>
Status launch(const Kernel<Params>& kernel, int64_t num_blocks, int num_threads, size_t shared_bytes,
              Stream stream, const Params& params) {
  if (num_blocks == 0) return nullptr;
  const Size size{num_blocks, num_threads, shared_bytes};
  if (num_blocks > INT32_MAX) {
    return launch_error(kernel.name, size, "too many blocks for one launch");
  }
  return start(kernel, size, stream, params);
}

}  // namespace hypenet::cuda
