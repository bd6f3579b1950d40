// constrain_ends on a grid, in two launches: where a chunk ends depends on where it begins alone, so each row's thread
// asks that of a chunk which begins there; then a thread for each sequence goes from chunk to chunk.
#pragma once

#include "../constrain.h"

namespace bytekernels {

// The rows of a sequence, within the text whatever the offsets are.
RAGGED_INLINE Range rows_within(const int32_t* cu, int64_t s, int64_t total) {
  const int64_t begin = cu[s];
  const int64_t end = cu[s + 1];
  return {begin < 0 ? 0 : begin, end < total ? end : total};
}

// A thread answers for a chunk that begins at its row.
struct ChunkEndKernel {
  ConstrainedText text;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  int32_t* end_from;  // [total]

  RAGGED_INLINE int64_t items() const { return total; }

  RAGGED_INLINE void operator()(int64_t row, int64_t& s) const {
    s = sequence_of(cu, sequences, row, s);
    const int64_t end = rows_within(cu, s, total).end;
    end_from[row] = static_cast<int32_t>(end > row ? text.chunk_end(row, end - 1) : row);
  }
};

// A thread sets the ends of one sequence; all rows hold 0 before.
struct SetEndsKernel {
  ConstrainedText text;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  const int32_t* end_from;
  uint8_t* ends;

  RAGGED_INLINE int64_t items() const { return sequences; }

  RAGGED_INLINE void operator()(int64_t s, int64_t&) const {
    const Range rows = rows_within(cu, s, total);
    text.set_ends(rows, ends, [&](int64_t row) {
      const int64_t end = end_from[row];  // of another sequence where the offsets are none
      return end < row ? row : end < rows.end ? end : rows.end - 1;
    });
  }
};

}  // namespace bytekernels
