// next_byte_targets on a grid.
#pragma once

#include "cuda/vector.h"

namespace bytekernels {

// A thread writes aligned vectors of two targets.
struct TargetsKernel {
  const uint8_t* ids;
  const uint8_t* boundary;  // or null
  const int32_t* cu;
  int64_t sequences;
  int64_t total;
  Vectors out;  // of int64

  RAGGED_INLINE int64_t items() const { return out.count(); }

  RAGGED_INLINE int64_t target(int64_t row, int64_t& s) const {
    if (row < 0 || row >= total) return 0;  // outside
    s = sequence_of(cu, sequences, row, s);
    const int64_t next = row + 1;
    if (next >= total || (s + 1 < sequences && next == cu[s + 1])) return kIgnore;
    return ids[next] + (boundary && boundary[next] ? 256 : 0);
  }

  RAGGED_INLINE void operator()(int64_t item, int64_t& s) const {
    const int64_t row = out.begin(item) / static_cast<int64_t>(sizeof(int64_t));
    const auto low = static_cast<uint64_t>(target(row, s));
    const auto high = static_cast<uint64_t>(target(row + 1, s));
    store(out, item, {low, high});
  }
};

}  // namespace bytekernels
