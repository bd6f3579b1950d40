// How an op's bindings get into bytekernels._C, and how its arguments are checked.
//
// Python owns allocation, checks dtype, device and contiguity, and passes every array as (address, bytes, owner). A
// file in bind/ turns those into typed pointers, checks sizes and offsets, releases the GIL and calls the op in cpu/.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "ragged.h"

namespace bytekernels {

namespace py = pybind11;

// Adds a function to those that module.cpp runs on the module. Used through BYTEKERNELS_BIND.
class Binding {
 public:
  explicit Binding(void (*bind)(py::module_&));
  static void run_all(py::module_& module);
};

// BYTEKERNELS_BIND(m) { m.def(...); } in a file of bind/ adds that op to the module. All of bind/ is compiled as one
// file, so each has a namespace for what it defines: bytekernels::norm_bindings in bind/norm.cpp.
#define BYTEKERNELS_BIND(module)                      \
  static void bind(::pybind11::module_& module);      \
  static const ::bytekernels::Binding binding(&bind); \
  static void bind(::pybind11::module_& module)

// An array as Python passes it: a tuple of the address and size in bytes of contiguous memory on the host, and
// whatever else keeps that memory alive during the call.
struct Array {
  uintptr_t address;
  int64_t bytes;
};

// Raises ValueError with the parts of the message joined.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string message;
  auto append = [&message](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (append(parts), ...);
  throw py::value_error(message);
}

// How many elements of `size` bytes the array holds.
int64_t elements(const Array& array, int64_t size, const char* name);

// The product of sizes, each at least 0; refused where it passes 2^63.
int64_t product(std::initializer_list<int64_t> sizes);

// The array as `count` elements of T.
//
// Raises ValueError, naming the argument, where its size is another, or it is misaligned for T or null.
template <class T>
T* pointer(const Array& array, int64_t count, const char* name) {
  const int64_t held = elements(array, sizeof(T), name);
  if (held != count) refuse(name, " must have ", count, " elements, got ", held);
  if (array.address % alignof(T) != 0) refuse(name, " is not aligned to ", alignof(T), " bytes");
  return reinterpret_cast<T*>(array.address);
}

// Offsets that cut `total` rows into sequences, checked.
struct Offsets {
  const int32_t* cu;
  int64_t sequences;
};

// Raises ValueError, naming the argument and the index, where the offsets break the rules of ragged.h.
Offsets offsets(const Array& array, int64_t total, const char* name = "cu_seqlens");

}  // namespace bytekernels

namespace pybind11::detail {

template <>
struct type_caster<bytekernels::Array> {
  PYBIND11_TYPE_CASTER(bytekernels::Array, const_name("tuple[int, int, object]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    if (fields.size() < 2) return false;
    make_caster<uintptr_t> address;
    make_caster<int64_t> bytes;
    if (!address.load(fields[0], false) || !bytes.load(fields[1], false)) return false;
    value = {cast_op<uintptr_t>(address), cast_op<int64_t>(bytes)};
    return true;
  }
};

}  // namespace pybind11::detail
