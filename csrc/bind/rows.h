// Arguments that are rows of a tensor, strided as in a slice of columns.
#pragma once

#include <optional>
#include <tuple>

#include "bindings.h"
#include "rows.h"

namespace bytekernels {

// Rows as Python passes them: address, bytes from the first element to the last one's end, elements from row to row,
// and the owner of the memory.
using RowsArray = std::tuple<uintptr_t, int64_t, int64_t, py::object>;

// The array as `count` rows of `width` elements of T.
//
// Raises ValueError, naming the argument, where rows overlap, or its size or alignment do not fit.
template <class T>
Rows<T> rows(const RowsArray& array, int64_t count, int64_t width, const char* name) {
  const auto& [address, bytes, stride, owner] = array;
  if (stride < width) refuse(name, " must have rows of ", width, " elements, got a row stride of ", stride);
  const int64_t span = count > 0 && width > 0 ? (count - 1) * stride + width : 0;
  return {pointer<T>({address, bytes}, span, name), stride};
}

template <class T>
Rows<T> rows(const std::optional<RowsArray>& array, int64_t count, int64_t width, const char* name) {
  return array ? rows<T>(*array, count, width, name) : Rows<T>{nullptr, 0};
}

// As pointer() of bindings.h, null for None.
template <class T>
T* optional_pointer(const std::optional<Array>& array, int64_t count, const char* name) {
  return array ? pointer<T>(*array, count, name) : nullptr;
}

}  // namespace bytekernels
