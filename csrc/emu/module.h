// The bindings of the machine's settings and records in a module of emulated kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "state.h"

namespace hypenet::emu {

namespace py = pybind11;

inline std::vector<int64_t> integers(py::handle items) {
  std::vector<int64_t> values;
  for (py::handle item : items) values.push_back(item.cast<int64_t>());
  return values;
}

inline Tensor tensor_of(py::handle item) {
  const auto t = py::cast<py::tuple>(item);
  return {t[0].cast<std::string>(), t[1].cast<uintptr_t>(), t[2].cast<size_t>(),
          integers(t[3]),           integers(t[4]),         t[5].cast<bool>()};
}

inline py::dict dict_of(const Record& record) {
  py::dict d;
  d["name"] = record.name;
  d["kernel"] = record.kernel;
  d["num_blocks"] = record.num_blocks;
  d["num_threads"] = record.num_threads;
  d["shared_bytes"] = record.shared_bytes;
  d["params"] = py::bytes(record.params);
  d["ldmatrix_accesses"] = record.ldmatrix.accesses;
  d["ldmatrix_ways"] = record.ldmatrix.ways;
  return d;
}

inline void bind_machine(py::module_& m) {
  m.def("set_seed", [](uint64_t seed) { machine.seed = seed; });
  m.def("set_num_processors", [](int count) { machine.num_processors = count; });
  m.def("set_max_shared_bytes", [](int bytes) { machine.max_shared_bytes = bytes; });
  m.def("set_only_records", [](bool only) { machine.only_records = only; }, "Launches then run nothing.");
  m.def(
      "set_tensors",
      [](const py::list& items) {
        std::vector<Tensor> tensors;
        for (py::handle item : items) tensors.push_back(tensor_of(item));
        machine.global.set(std::move(tensors));
      },
      "The memory that kernels may touch: (name, address, bytes of an element, shape, strides, writable) "
      "each.");
  m.def("launches", [] {
    py::list list;
    for (const auto& record : machine.records) list.append(dict_of(record));
    return list;
  });
  m.def("call_chain", [] {
    py::list list;
    for (const uintptr_t offset : machine.call_chain) list.append(offset);
    return list;
  });
  m.def("forget_launches", [] { machine.records.clear(); });
}

}  // namespace hypenet::emu
