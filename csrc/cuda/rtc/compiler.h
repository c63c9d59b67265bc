// The interface of rtc/launch.cpp to the compiler, which is in Python (module.h).
#pragma once

#include <string>
#include <vector>

#include "../launch.h"

namespace hypenet::cuda::rtc {

struct Cubin {
  std::string code;
  std::string entry;  // the kernel's symbol in it
};

// Compiles the kernel `expression` of csrc/cuda/`source` for compute capability major.minor; throws what the compiler
// raises.
using Compile = Cubin (*)(const std::string& source, const std::string& expression, int major, int minor);

// Set once, when the module is imported.
extern Compile compile;

// A kernel and what it would be started with.
struct Launch {
  const KernelState* kernel;
  Size size;
  std::string params;  // the bytes of its struct
};

// While something collects, launches do nothing but say what they would start, on a device like this.
struct Collection {
  Device device;
  std::vector<Launch> launches;
};
void start_collecting(const Device& device);
Collection stop_collecting();

}  // namespace hypenet::cuda::rtc
