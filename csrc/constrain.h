// Chunk ends held to a vocabulary (bytekernels/constrain/reference.py says what is computed).
#pragma once

#include "trie.h"

namespace bytekernels {

// Writes the ends of one sequence, the rows of ids, boundary and ends: flags of 0 and 1. Where a chunk ends depends on
// where the one before it did, so the walk is along the sequence.
RAGGED_INLINE void constrain_sequence(const StringTrie& strings, const uint8_t* ids, const uint8_t* boundary,
                                      Range rows, uint8_t* ends) {
  if (rows.size() <= 0) return;
  int64_t node = strings.trie.child(0, ids[rows.begin]);  // of the open chunk's bytes, -1 where they begin no string
  for (int64_t row = rows.begin; row + 1 < rows.end; ++row) {
    const uint8_t next = ids[row + 1];
    const int64_t longer = node < 0 ? -1 : strings.trie.child(node, next);
    const bool end = longer < 0 || (boundary[row] && strings.ids[node] >= 0);
    ends[row] = end;
    node = end ? strings.trie.child(0, next) : longer;
  }
  ends[rows.end - 1] = boundary[rows.end - 1] != 0;
}

// All sequences.
void constrain_ends(const StringTrie& strings, const uint8_t* ids, const int32_t* cu, int64_t sequences, int64_t total,
                    const uint8_t* boundary, uint8_t* ends, int threads);

}  // namespace bytekernels
