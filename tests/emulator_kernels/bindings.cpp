#include "bind.h"
#include "kernels.h"

namespace hypenet {

void bind_machine(py::module_& m);

}  // namespace hypenet

PYBIND11_MODULE(_emulator_tests, m) {
  using namespace hypenet;
  using emu_tests::Operands;
  bind_machine(m);
  const std::vector<Field<Operands>> fields = {FIELD(Operands, a), FIELD(Operands, b), FIELD(Operands, c),
                                               FIELD(Operands, n), FIELD(Operands, num_blocks)};
  for (const auto* entries : {emu_tests::kBad, emu_tests::kGood}) {
    for (; entries->name != nullptr; ++entries)
      def_kernel<Operands>(m, entries->name, entries->kernel, fields);
  }
}
