#include "bind.h"
#include "emu/module.h"
#include "fields.h"
#include "kernels.h"

PYBIND11_MODULE(_emulator_tests, m) {
  using namespace hypenet;
  using Params = emu_tests::Operands;
  emu::bind_machine(m);
  const Fields<Params> fields = {FIELD(a), FIELD(b), FIELD(c), FIELD(n), FIELD(num_blocks)};
  for (const auto* entries : {emu_tests::kBad, emu_tests::kBadWgmma, emu_tests::kBadRoles, emu_tests::kGood,
                              emu_tests::kGoodSm90}) {
    for (; entries->name != nullptr; ++entries) def_kernel(m, entries->name, entries->kernel, fields);
  }
}
