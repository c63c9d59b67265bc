#include "driver.h"

#include <dlfcn.h>

namespace hypenet::cuda::rtc {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

struct Found {
  Driver driver{};
  std::string why;  // empty: it can be used
};

template <class Function>
void find(void* library, const char* name, Function*& function, std::string& why) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr && why.empty()) {
    why = std::string("this NVIDIA driver has no ") + name + ": it is older than that of CUDA 12";
  }
}

Found find_driver() {
  Found found;
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.why = std::string("no NVIDIA driver: ") + dlerror();
    return found;
  }
#define FIND(name) find(library, #name, found.driver.name, found.why)
  FIND(cuInit), FIND(cuGetErrorString), FIND(cuDeviceGet), FIND(cuDeviceGetAttribute);
  FIND(cuDevicePrimaryCtxRetain), FIND(cuCtxGetCurrent), FIND(cuCtxSetCurrent);
  FIND(cuThreadExchangeStreamCaptureMode), FIND(cuLibraryLoadData), FIND(cuLibraryGetKernel);
  FIND(cuKernelSetAttribute), FIND(cuLaunchKernel);
#undef FIND
  if (!found.why.empty()) return found;
  if (const Result error = found.driver.cuInit(0); error != 0) {
    found.why = "the NVIDIA driver does not start: " + describe(found.driver, error);
  }
  return found;
}

}  // namespace

const Driver* driver(std::string& why) {
  static const Found found = find_driver();
  why = found.why;
  return found.why.empty() ? &found.driver : nullptr;
}

std::string describe(const Driver& driver, Result error) {
  const char* text = nullptr;
  driver.cuGetErrorString(error, &text);
  return std::string(text == nullptr ? "unknown error" : text) + " (CUDA error " + std::to_string(error) +
         ")";
}

}  // namespace hypenet::cuda::rtc
