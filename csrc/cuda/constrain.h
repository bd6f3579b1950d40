// constrain_ends on a grid, in two launches: which chunks may begin at a row depends on the bytes from there on alone,
// so each row has a thread that looks; then a thread for each sequence finds the best way through them.
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
struct ChoicesKernel {
  ConstrainedText text;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  Choices* choices;  // [total]

  RAGGED_INLINE int64_t items() const { return total; }

  RAGGED_INLINE void operator()(int64_t row, int64_t& s) const {
    s = sequence_of(cu, sequences, row, s);
    choices[row] = text.choices_from(row, rows_within(cu, s, total).end);
  }
};

// A thread sets the ends of one sequence; all rows hold 0 before.
struct CutKernel {
  ConstrainedText text;
  int64_t total;
  const int32_t* cu;
  const int32_t* given;
  int64_t sequences;
  const Choices* choices;
  double* best;     // [total]
  uint8_t* before;  // [total]
  uint8_t* ends;

  RAGGED_INLINE int64_t items() const { return sequences; }

  RAGGED_INLINE void operator()(int64_t s, int64_t&) const {
    const auto choices_of = [this](int64_t row, int64_t) { return choices[row]; };
    const Cutter<decltype(choices_of)> cutter{text, choices_of, best, before, ends};
    cutter.cut(rows_within(cu, s, total), given[s]);
  }
};

}  // namespace bytekernels
