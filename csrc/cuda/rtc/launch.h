// launch.h for kernels that NVRTC compiles at their first launch on a device. The launchers are compiled by a C++ compiler,
// which reads the kernels and generates none: only their types are used.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <typeinfo>

namespace hypenet::cuda {

// A kernel of one set of template arguments, and what each device has loaded of it.
class KernelState {
 public:
  // file: that of the launcher; qualified: from namespace hypenet::cuda on; arguments: the type TypeList<...>.
  KernelState(const char* file, const char* qualified, const std::type_info& arguments);

  Status start(const Size& size, Stream stream, const void* params, size_t params_bytes);

  const char* const qualified;
  const std::string source;      // the header that defines it: "gated_delta_scan.cuh"
  const std::string expression;  // its name in C++: "hypenet::cuda::...::gated_delta_scan_kernel<...>"

 private:
  Status load(const Size& size, int device);

  struct Loaded {
    std::atomic<void*> kernel = nullptr;  // CUkernel
    void* context = nullptr;              // CUcontext, the device's primary one
    std::atomic<int> allowed = -1;        // bytes of shared memory that a block may ask for
  };
  Loaded loaded_[kMaxDevices];
  std::mutex mutex_;  // one thread compiles and loads, others wait for it
};

template <class... Types>
struct TypeList {};

template <class Params>
struct Kernel {
  const char* name;
  KernelState& state;
};

// entry: a null pointer of the kernel's type.
template <class Params>
Kernel<Params> make_kernel(KernelState& state, [[maybe_unused]] void (*entry)(Params)) {
  return {state.qualified, state};
}

// decltype does not instantiate the kernel.
#define KERNEL(name, ...)                                                                       \
  [] {                                                                                          \
    static KernelState state(__FILE__, #name, typeid(TypeList<__VA_ARGS__>));                   \
    return make_kernel(state, static_cast<decltype(&name __VA_OPT__(<__VA_ARGS__>))>(nullptr)); \
  }()

Status find_device(int index, Device& device);

template <class Params>
Status start(const Kernel<Params>& kernel, const Size& size, Stream stream, const Params& params) {
  return kernel.state.start(size, stream, &params, sizeof(Params));
}

}  // namespace hypenet::cuda
