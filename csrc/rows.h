// Rows of a tensor that may be a slice of columns of a wider one.
#pragma once

#include <cstdint>

namespace bytekernels {

// Rows of elements, `stride` elements apart; each row's own elements are contiguous.
template <class E>
struct Rows {
  E* data;
  int64_t stride;

  E* operator[](int64_t row) const { return data + row * stride; }
};

}  // namespace bytekernels
