// Chunk ends held to a vocabulary (bytekernels/constrain/reference.py says what is computed).
#pragma once

#include "trie.h"

namespace bytekernels {

struct ConstrainedText {
  StringTrie strings;
  const uint8_t* ids;
  const uint8_t* boundary;  // flags of 0 and 1, like ends

  // The row that a chunk which begins at `row` ends on, or comes to its sequence's last row, `last`, without an end. It
  // walks no further than the longest string.
  RAGGED_INLINE int64_t chunk_end(int64_t row, int64_t last) const {
    int64_t node = strings.trie.child(0, ids[row]);
    for (; row < last; ++row) {
      const int64_t longer = node < 0 ? -1 : strings.trie.child(node, ids[row + 1]);
      if (longer < 0 || (boundary[row] && strings.ids[node] >= 0)) return row;
      node = longer;
    }
    return last;
  }

  // Sets the ends of the sequence of these rows, of which none is set before. end_from(row) is chunk_end(row, last).
  template <class EndFrom>
  RAGGED_INLINE void set_ends(Range rows, uint8_t* ends, const EndFrom& end_from) const {
    const int64_t last = rows.end - 1;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      row = end_from(row);
      ends[row] = row < last || boundary[row];
    }
  }
};

// All sequences; writes all of ends.
void constrain_ends(const ConstrainedText& text, const int32_t* cu, int64_t sequences, int64_t total, uint8_t* ends,
                    int threads);

}  // namespace bytekernels
