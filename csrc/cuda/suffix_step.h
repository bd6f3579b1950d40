// longest_suffix_step on a grid.
#pragma once

#include "../suffix.h"

namespace bytekernels {

// A thread takes the byte of one sequence.
struct SuffixStepKernel {
  StringTrie suffixes;
  const uint8_t* ids;
  const uint8_t* active;  // null: all are
  SuffixRing ring;
  int32_t* found;

  RAGGED_INLINE int64_t items() const { return ring.sequences; }

  RAGGED_INLINE void operator()(int64_t s, int64_t&) const {
    const bool taken = !active || active[s];
    found[s] = taken ? ring.take(suffixes, s, ids[s], suffixes.trie.child(0, ids[s])) : -1;
  }
};

}  // namespace bytekernels
