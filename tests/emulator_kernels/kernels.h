// Small kernels for the tests of the emulator: some correct, the others with one error each.
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

// Defined in bad.cu, good.cu, and for sm_90a in bad_wgmma.cu, bad_roles.cu, good_sm90.cu; a nullptr name ends the list.
extern const Entry kBad[], kBadWgmma[], kBadRoles[];
extern const Entry kGood[], kGoodSm90[];

}  // namespace hypenet::emu_tests
