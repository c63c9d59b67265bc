#include "bind.h"
#include "emu/module.h"
#include "kernels.h"

PYBIND11_MODULE(_emulator_tests, m) {
  using namespace hypenet;
  using emu_tests::Operands;
  emu::bind_machine(m);
  const std::vector<Field<Operands>> fields = {FIELD(Operands, a), FIELD(Operands, b), FIELD(Operands, c),
                                               FIELD(Operands, n), FIELD(Operands, num_blocks)};
  for (const auto* entries : {emu_tests::kBad, emu_tests::kGood}) {
    for (; entries->name != nullptr; ++entries)
      def_kernel<Operands>(m, entries->name, entries->kernel, fields);
  }
}
