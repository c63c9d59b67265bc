// The bindings of the compiler in the module whose kernels NVRTC compiles.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "compiler.h"
#include "driver.h"

namespace hypenet::cuda::rtc {

namespace py = pybind11;

inline PyObject* python_compile = nullptr;  // compile(source, expression, (major, minor)) -> (cubin, entry)

inline Cubin call_python_compile(const std::string& source, const std::string& expression, int major,
                                 int minor) {
  const py::gil_scoped_acquire acquire;
  const auto run = py::reinterpret_borrow<py::function>(python_compile);
  const py::tuple found = run(source, expression, py::make_tuple(major, minor));
  return {found[0].cast<std::string>(), found[1].cast<std::string>()};
}

inline void bind_compiler(py::module_& m) {
  m.def(
      "set_compiler",
      [](const py::function& run) {
        python_compile = run.inc_ref().ptr();
        compile = call_python_compile;
      },
      "Set the function compile(source, expression, (major, minor)) that returns (cubin, symbol).");
  m.def(
      "missing_driver",
      [] {
        std::string why;
        driver(why);
        return why;
      },
      "Why there is no driver; empty if there is one.");
  m.def(
      "start_collecting",
      [](int num_processors, int max_shared_bytes) { start_collecting({num_processors, max_shared_bytes}); },
      "From here on launch nothing, and record what a device like this would start.");
  m.def(
      "stop_collecting",
      [] {
        py::list launches;
        for (const Launch& launch : stop_collecting().launches) {
          const auto& [kernel, size, params] = launch;
          launches.append(py::make_tuple(kernel->source, kernel->expression, size.num_blocks,
                                         size.num_threads, size.shared_bytes, py::bytes(params)));
        }
        return launches;
      },
      "Launch again; return the launches since start_collecting: (source, expression, blocks, threads, "
      "bytes of shared memory, params) each.");
}

}  // namespace hypenet::cuda::rtc
