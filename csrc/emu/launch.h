// cuda/launch.h on the host: the kernels are executed by the emulated machine.
#pragma once

#include "machine.h"

namespace hypenet::cuda {

template <class Params>
struct Kernel {
  const char* name;
  void (*entry)(Params);
};

template <class Params>
Kernel<Params> make_kernel(const char* name, void (*entry)(Params)) {
  return {name, entry};
}

#define KERNEL(name, ...) make_kernel(#name, &name __VA_OPT__(<__VA_ARGS__>))

inline Status find_device(int, Device& device) {
  device = {emu::num_processors(), emu::max_shared_bytes()};
  return nullptr;
}

// Gives a thread its copy of the parameters. They are in host memory, which is not checked.
template <class Params>
[[gnu::noinline]] __attribute__((no_sanitize("thread"))) void call_kernel(const void* kernel,
                                                                          const void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

template <class Params>
Status start(const Kernel<Params>& kernel, const Size& size, Stream, const Params& params) {
  return emu::run({last_name(kernel.name), reinterpret_cast<const void*>(kernel.entry), call_kernel<Params>,
                   &params, sizeof(Params), size.num_blocks, size.num_threads, size.shared_bytes});
}

}  // namespace hypenet::cuda
