// token_prefix on a grid.
#pragma once

#include "../trie.h"

namespace bytekernels {

// A thread walks along the chunk that follows one boundary, for as long as its bytes begin a string. All rows hold -1
// before, and those that no walk comes to keep it.
struct TokenPrefixKernel {
  Trie trie;
  const uint8_t* ids;
  int64_t total;
  const int32_t* cu;
  int64_t sequences;
  const uint8_t* boundary;
  int32_t* prefix;

  RAGGED_INLINE int64_t items() const { return total; }

  RAGGED_INLINE void operator()(int64_t row, int64_t& s) const {
    if (!boundary[row]) return;
    s = sequence_of(cu, sequences, row, s);
    const int64_t end = cu[s + 1] < total ? cu[s + 1] : total;
    int64_t node = 0;
    prefix[row] = 0;
    for (++row; row < end && !boundary[row]; ++row) {
      node = trie.child(node, ids[row]);
      if (node < 0) return;
      prefix[row] = static_cast<int32_t>(node);
    }
  }
};

}  // namespace bytekernels
