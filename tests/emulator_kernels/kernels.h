// Little kernels for the tests of the emulator: some right, some each wrong in one way.
#pragma once

#include "cuda/kernels.h"
#include "params.h"

namespace hypenet::emu_tests {

struct Operands {
  const void *a, *b;
  void* c;
  int64_t n;
  int64_t num_blocks;
};

using Kernel = Status (*)(const Operands&, cuda::Stream);

struct Entry {
  const char* name;
  Kernel kernel;
};

// In bad.cu and good.cu; the last entry has no name.
extern const Entry kBad[];
extern const Entry kGood[];

}  // namespace hypenet::emu_tests
