// longest_suffix on a grid.
#pragma once

#include "../suffix.h"

namespace bytekernels {

// A thread answers for one row; a row that is not of the text has -1.
struct SuffixKernel {
  StringTrie suffixes;
  const uint8_t* ids;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  const int32_t* rows;  // null: row i is i
  int64_t count;
  int32_t* found;

  RAGGED_INLINE int64_t items() const { return count; }

  RAGGED_INLINE void operator()(int64_t item, int64_t& s) const {
    const int64_t row = rows ? rows[item] : item;
    if (row < 0 || row >= total) {
      found[item] = -1;
      return;
    }
    s = sequence_of(cu, sequences, row, rows ? -1 : s);
    const int64_t start = cu[s] < 0 ? 0 : cu[s];
    const uint8_t* const newest = ids + row;
    found[item] = longest_below(suffixes, suffixes.trie.child(0, *newest), row + 1 - start,
                                [&](int64_t depth) { return newest[-depth]; });
  }
};

}  // namespace bytekernels
