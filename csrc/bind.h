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
  bool written;  // a pointer through which the kernel writes
};

inline void from_python(py::handle value, View& view) {
  const auto t = py::cast<py::tuple>(value);
  view = {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

inline void from_python(py::handle value, Indices& indices) {
  const auto t = py::cast<py::tuple>(value);
  indices = {reinterpret_cast<const void*>(t[0].cast<uintptr_t>()), t[1].cast<bool>()};
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

inline py::handle keyword(const std::string& op, const py::kwargs& kwargs, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(kwargs.ptr(), name);
  if (value == nullptr) {
    throw py::type_error(op + ": missing field " + py::str(py::handle(name)).cast<std::string>());
  }
  return value;
}

template <auto Member>
struct FieldOf;
template <class Params, class T, T Params::* Member>
struct FieldOf<Member> {
  static Field<Params> named(const char* name) {
    return {PyUnicode_InternFromString(name),
            [](Params& params, py::handle value) { from_python(value, params.*Member); },
            std::is_pointer_v<T> && !std::is_const_v<std::remove_pointer_t<T>>};
  }
};

// "Writes: state, o."
template <class Params>
std::string doc_of(const std::vector<Field<Params>>& fields) {
  std::string doc;
  for (const auto& field : fields) {
    if (!field.written) continue;
    doc += (doc.empty() ? "Writes: " : ", ") + py::str(py::handle(field.name)).cast<std::string>();
  }
  return doc + ".";
}

// `run` calls the kernel with the params struct and the value of the keyword argument `extra`, where it has a
// name.
template <class Params, class Run>
void def_call(py::module_& module, const char* name, std::vector<Field<Params>> fields, PyObject* extra,
              Run run) {
  const std::string doc = doc_of(fields);
  auto call = [fields = std::move(fields), extra, run, op = std::string(name)](const py::kwargs& kwargs) {
    Params params{};
    for (const auto& field : fields) field.set(params, keyword(op, kwargs, field.name));
    const py::handle argument = extra == nullptr ? py::handle() : keyword(op, kwargs, extra);
    if (kwargs.size() != fields.size() + (extra != nullptr)) {
      throw py::type_error(op + ": unknown field among " + py::str(kwargs).cast<std::string>());
    }
    const Status status = run(params, argument);
    if (status != nullptr) throw std::runtime_error(op + ": " + status);
  };
  module.def(name, std::move(call), doc.c_str());
}

// A CPU kernel.
template <class Params>
void def_kernel(py::module_& module, const char* name, Status (*kernel)(const Params&),
                std::vector<Field<Params>> fields) {
  auto run = [kernel](const Params& params, py::handle) {
    py::gil_scoped_release release;
    return kernel(params);
  };
  def_call(module, name, std::move(fields), nullptr, run);
}

// A CUDA kernel: takes the keyword argument `stream` too, a cudaStream_t as an integer.
template <class Params, class Stream>
void def_kernel(py::module_& module, const char* name, Status (*kernel)(const Params&, Stream*),
                std::vector<Field<Params>> fields) {
  auto run = [kernel](const Params& params, py::handle argument) {
    Stream* stream = nullptr;
    from_python(argument, stream);
    py::gil_scoped_release release;
    return kernel(params, stream);
  };
  def_call(module, name, std::move(fields), PyUnicode_InternFromString("stream"), run);
}

// FIELD(GatedDeltaFwdParams, q) names a member once.
#define FIELD(Params, member) FieldOf<&Params::member>::named(#member)

}  // namespace hypenet
