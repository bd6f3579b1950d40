// unpack on a grid: rows of a flat axis to padded sequences.
#pragma once

#include "cuda/vector.h"

namespace bytekernels {

// A thread writes aligned vectors of the output: padding, and over it what the sequences have there.
struct UnpackKernel {
  const uint8_t* values;
  int64_t value_bytes;
  const int32_t* cu;
  int64_t row_bytes;
  int64_t padded_bytes;  // of one padded sequence
  Vector pad;            // as every aligned vector of padding looks
  Vectors out;

  RAGGED_INLINE int64_t items() const { return out.count(); }

  // The element's pattern, as the vectors of an output at this address have it; element_bytes divides 16.
  static Vector padding(const uint8_t* element, int64_t element_bytes, const Vectors& out) {
    uint8_t bytes[Vector::kBytes];
    for (int64_t i = 0; i < Vector::kBytes; ++i) {
      bytes[i] = element[(i + Vector::kBytes - out.skew()) % element_bytes];
    }
    Vector vector;
    std::memcpy(&vector, bytes, sizeof vector);
    return vector;
  }

  // item / padded_bytes, by 32-bit division where that does.
  RAGGED_INLINE int64_t sequence_at(int64_t byte) const {
    const auto numerator = static_cast<uint64_t>(byte);
    const auto divisor = static_cast<uint64_t>(padded_bytes);
    if (((numerator | divisor) >> 32) == 0) return static_cast<uint32_t>(numerator) / static_cast<uint32_t>(divisor);
    return static_cast<int64_t>(numerator / divisor);
  }

  RAGGED_INLINE void operator()(int64_t item, int64_t&) const {
    const int64_t begin = out.begin(item);
    const Range inside = out.inside(item);
    Vector vector = pad;
    int64_t s = sequence_at(inside.begin);
    for (int64_t start = s * padded_bytes; start < inside.end; ++s, start += padded_bytes) {
      const int64_t length = (int64_t{cu[s + 1]} - cu[s]) * row_bytes;
      const int64_t filled = start + (length < padded_bytes ? length : padded_bytes);
      const int64_t from = start > inside.begin ? start : inside.begin;
      const int64_t to = filled < inside.end ? filled : inside.end;
      if (from >= to) continue;
      const Vector held = load(values, value_bytes, begin - start + cu[s] * row_bytes);
      vector = merge(vector, held, from - begin, to - begin);
    }
    store(out, item, vector);
  }
};

}  // namespace bytekernels
