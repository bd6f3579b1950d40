// row_index on a grid.
#pragma once

#include "cuda/vector.h"

namespace bytekernels {

// A thread writes aligned vectors of four rows of `sequence`, and the same rows of `position`, which lies at an address
// that is aligned alike.
struct RowIndexKernel {
  const int32_t* cu;
  int64_t sequences;
  Vectors sequence;  // of int32
  Vectors position;  // of int32

  RAGGED_INLINE int64_t items() const { return sequence.count(); }

  RAGGED_INLINE void operator()(int64_t item, int64_t& s) const {
    const int64_t row = sequence.begin(item) / static_cast<int64_t>(sizeof(int32_t));
    const int64_t total = sequence.bytes / static_cast<int64_t>(sizeof(int32_t));
    Vector sequences_of{0, 0};
    Vector positions{0, 0};
    for (int64_t i = 0; i < 4; ++i) {
      if (row + i < 0 || row + i >= total) continue;
      s = sequence_of(cu, sequences, row + i, s);
      set(sequences_of, i, s);
      set(positions, i, row + i - cu[s]);
    }
    store(sequence, item, sequences_of);
    store(position, item, positions);
  }

 private:
  RAGGED_INLINE static void set(Vector& vector, int64_t i, int64_t value) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(value)) << (32 * (i % 2));
    if (i < 2) {
      vector.low |= bits;
    } else {
      vector.high |= bits;
    }
  }
};

}  // namespace bytekernels
