// token_end_mask on a grid, from the running sum of the tokens' lengths.
#pragma once

#include "cuda/vector.h"

namespace bytekernels {

// A thread writes aligned vectors of the mask: a row is a token's end if, counted from its sequence's first token, the
// lengths up to some token sum to the rows up to it.
struct TokenEndsKernel {
  const int32_t* sums;  // of token lengths up to and with each token, [tokens]
  int64_t tokens;
  const int32_t* token_cu;
  const int32_t* cu;
  int64_t sequences;
  bool bos;
  Vectors out;

  RAGGED_INLINE int64_t items() const { return out.count(); }

  RAGGED_INLINE void operator()(int64_t item, int64_t& s) const {
    Vector vector{0, 0};
    for_sequences_in(out, item, cu, sequences, s,
                     [&](int64_t sequence, Range rows) { mark(sequence, rows, out.begin(item), vector); });
    store(out, item, vector);
  }

 private:
  // Ends among the rows of a piece of sequence s.
  RAGGED_INLINE void mark(int64_t s, Range rows, int64_t begin, Vector& vector) const {
    const Vector one = splat(1);
    if (bos && rows.begin <= cu[s]) vector = merge(vector, one, cu[s] - begin, cu[s] + 1 - begin);
    const int64_t first = token_cu[s] > 0 ? token_cu[s] : 0;
    const int64_t last = token_cu[s + 1] < tokens ? token_cu[s + 1] : tokens;
    // A sum less this is the row after the token's last.
    const int64_t origin = (first > 0 && first <= tokens ? sums[first - 1] : 0) - (cu[s] + (bos ? 1 : 0));
    for (int64_t token = first + ending_by(first, last, rows.begin + origin); token < last; ++token) {
      const int64_t row = sums[token] - origin - 1;
      if (row >= rows.end) break;
      vector = merge(vector, one, row - begin, row + 1 - begin);
    }
  }

  // How many of the tokens [first, last) end at or before a sum.
  RAGGED_INLINE int64_t ending_by(int64_t first, int64_t last, int64_t sum) const {
    return first < last ? first_starting_at(sums + first, last - first, sum + 1) : 0;
  }
};

}  // namespace bytekernels
