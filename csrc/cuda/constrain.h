// constrain_ends on a grid.
#pragma once

#include "../constrain.h"

namespace bytekernels {

// A thread walks along one sequence.
struct ConstrainKernel {
  StringTrie strings;
  const uint8_t* ids;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  const uint8_t* boundary;
  uint8_t* ends;

  RAGGED_INLINE int64_t items() const { return sequences; }

  RAGGED_INLINE void operator()(int64_t s, int64_t&) const {
    const int64_t begin = cu[s];
    const int64_t end = cu[s + 1];
    constrain_sequence(strings, ids, boundary, {begin < 0 ? 0 : begin, end < total ? end : total}, ends);
  }
};

}  // namespace bytekernels
