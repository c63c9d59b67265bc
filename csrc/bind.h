// Binds a kernel as a Python function whose keyword arguments are exactly the fields of its params struct.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "params.h"

namespace hypenet {

namespace py = pybind11;

template <class Params>
struct Field {
  PyObject* name;  // interned, lives as long as the interpreter
  void (*set)(Params&, py::handle);
};

inline void from_python(py::handle value, View& view) {
  const auto t = py::cast<py::tuple>(value);
  view = {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

template <class T>
void from_python(py::handle value, T& field) {
  if constexpr (std::is_pointer_v<T>) {
    field = reinterpret_cast<T>(value.cast<uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(value.cast<int>());
  } else {
    field = value.cast<T>();
  }
}

template <auto Member>
struct FieldOf;
template <class Params, class T, T Params::* Member>
struct FieldOf<Member> {
  static Field<Params> named(const char* name) {
    return {PyUnicode_InternFromString(name),
            [](Params& params, py::handle value) { from_python(value, params.*Member); }};
  }
};

template <class Params>
void def_kernel(py::module_& module, const char* name, Status (*kernel)(const Params&),
                std::vector<Field<Params>> fields) {
  auto call = [fields = std::move(fields), kernel, op = std::string(name)](const py::kwargs& kwargs) {
    Params params{};
    for (const auto& field : fields) {
      PyObject* value = PyDict_GetItem(kwargs.ptr(), field.name);
      if (value == nullptr) {
        throw py::type_error(op + ": missing field " + py::str(py::handle(field.name)).cast<std::string>());
      }
      field.set(params, value);
    }
    if (kwargs.size() != fields.size()) {
      throw py::type_error(op + ": unknown field among " + py::str(kwargs).cast<std::string>());
    }
    Status status;
    {
      py::gil_scoped_release release;
      status = kernel(params);
    }
    if (status != nullptr) throw std::runtime_error(op + ": " + status);
  };
  module.def(name, std::move(call));
}

// FIELD(GatedDeltaFwdParams, q) names a member once.
#define FIELD(Params, member) FieldOf<&Params::member>::named(#member)

}  // namespace hypenet
