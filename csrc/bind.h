// Binds a kernel as a Python function of a dict, whose keys are the fields of its params struct.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "params.h"

namespace hypenet {

namespace py = pybind11;

template <class Params>
struct Field {
  PyObject* name;  // interned, lives as long as the interpreter
  void (*set)(Params&, PyObject*);
  bool written;   // a pointer through which the kernel writes
  bool optional;  // may be left out of the dict
};

template <class Params>
struct Fields : std::vector<Field<Params>> {
  using std::vector<Field<Params>>::vector;

  Fields operator+(const Fields& more) const {
    Fields all = *this;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
};

// The fields of a params struct: specialised in fields.h.
template <class Params>
Fields<Params> fields_of();

// On a type mismatch the Python error indicator is set. value == nullptr: the caller has already set it.
template <class T>
void from_python(PyObject* value, T& field) {
  if (value == nullptr) return;
  if constexpr (std::is_pointer_v<T>) {
    field = reinterpret_cast<T>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value)));
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(PyLong_AsLong(value));
  } else if constexpr (std::is_same_v<T, bool>) {
    field = PyObject_IsTrue(value) == 1;
  } else if constexpr (std::is_floating_point_v<T>) {
    field = PyFloat_AsDouble(value);
  } else {
    field = PyLong_AsLongLong(value);
  }
}

inline void from_python(PyObject* tuple, View& view) {
  from_python(PyTuple_GetItem(tuple, 0), view.data);
  from_python(PyTuple_GetItem(tuple, 1), view.batch);
  from_python(PyTuple_GetItem(tuple, 2), view.token);
  from_python(PyTuple_GetItem(tuple, 3), view.head);
}

inline void from_python(PyObject* tuple, Indices& indices) {
  from_python(PyTuple_GetItem(tuple, 0), indices.data);
  from_python(PyTuple_GetItem(tuple, 1), indices.is_int32);
}

// Params: the struct; Member may belong to a base of it.
template <class Params, auto Member>
Field<Params> field(const char* name, bool optional = false) {
  using T = std::remove_cvref_t<decltype(std::declval<Params&>().*Member)>;
  return {PyUnicode_InternFromString(name),
          [](Params& params, PyObject* value) { from_python(value, params.*Member); },
          std::is_pointer_v<T> && !std::is_const_v<std::remove_pointer_t<T>>, optional};
}

// "Writes: state, o."
template <class Params>
std::string doc_of(const Fields<Params>& fields) {
  std::string doc;
  for (const auto& field : fields) {
    if (!field.written) continue;
    doc += (doc.empty() ? "Writes: " : ", ") + py::str(py::handle(field.name)).cast<std::string>();
  }
  return doc + ".";
}

// The struct with these fields, each under its name.
template <class Params>
Params params_from(const py::dict& values, const Fields<Params>& fields, const std::string& op) {
  Params params{};
  size_t num_found = 0;
  for (const auto& field : fields) {
    if (field.optional && num_found == values.size()) break;  // they come last
    PyObject* value = PyDict_GetItemWithError(values.ptr(), field.name);
    if (value == nullptr) {
      if (field.optional) continue;
      throw py::type_error(op + ": missing field " + py::str(py::handle(field.name)).cast<std::string>());
    }
    ++num_found;
    field.set(params, value);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  if (values.size() != num_found) {
    throw py::type_error(op + ": unknown field among " + py::str(values).cast<std::string>());
  }
  return params;
}

// Queue: empty for a CPU kernel. A CUDA kernel's function takes after the dict what its device is and the stream, as a
// tuple (device, cudaStream_t) of integers.
template <class Params, class... Queue>
void def_kernel(py::module_& module, const char* name, Status (*kernel)(const Params&, Queue...),
                Fields<Params> fields = fields_of<Params>()) {
  const std::string doc = doc_of(fields);
  auto call = [kernel, fields = std::move(fields), op = std::string(name)](const py::dict& values,
                                                                           Queue... queue) {
    const Params params = params_from(values, fields, op);
    Status status;
    {
      py::gil_scoped_release release;
      status = kernel(params, queue...);
    }
    if (status != nullptr) throw std::runtime_error(op + ": " + status);
  };
  module.def(name, std::move(call), doc.c_str());
}

}  // namespace hypenet

template <>
struct pybind11::detail::type_caster<hypenet::cuda::Stream> {
  PYBIND11_TYPE_CASTER(hypenet::cuda::Stream, const_name("tuple[int, int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
    hypenet::from_python(PyTuple_GET_ITEM(source.ptr(), 1), value.handle);
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
};
