// The longest vocabulary string that ends at a byte, by a walk from it backwards down the tree of reversed strings
// (bytekernels/suffix/reference.py says what is computed).
#pragma once

#include "trie.h"

namespace bytekernels {

// The id of the longest string on the walk that came to `node` (-1: nowhere) by the newest of `held` bytes and goes on
// by before(1), before(2), ..., the bytes before it.
template <class Before>
RAGGED_INLINE int32_t longest_below(const StringTrie& suffixes, int64_t node, int64_t held, const Before& before) {
  int32_t longest = -1;
  for (int64_t depth = 1; node >= 0; ++depth) {
    const int32_t id = suffixes.ids[node];
    if (id >= 0) longest = id;
    if (depth >= held) break;
    node = suffixes.trie.child(node, before(depth));
  }
  return longest;
}

// The newest bytes of several sequences. Byte i of sequence s lies in recent[s][i mod slots].
struct SuffixRing {
  uint8_t* recent;  // [sequences, slots]
  int32_t* counts;  // [sequences], the bytes so far
  int64_t sequences;
  int64_t slots;  // at least the length of the longest string

  // Takes a byte of sequence s, which leads from the root to `node`, and returns what longest_below finds there.
  RAGGED_INLINE int32_t take(const StringTrie& suffixes, int64_t s, uint8_t byte, int64_t node) const {
    const int64_t position = static_cast<uint32_t>(counts[s]);
    uint8_t* const bytes = recent + s * slots;
    bytes[position % slots] = byte;
    counts[s] = static_cast<int32_t>(static_cast<uint32_t>(position + 1));
    const int64_t held = position + 1 < slots ? position + 1 : slots;
    return longest_below(suffixes, node, held, [&](int64_t depth) { return bytes[(position - depth) % slots]; });
  }
};

// found[i] = the id for row rows[i] of ids (row i where rows is null), -1 where no string ends. Rows are of ids.
void longest_suffix(const StringTrie& suffixes, const uint8_t* ids, const int32_t* cu, int64_t sequences,
                    const int32_t* rows, int64_t count, int32_t* found, int threads);

// found[s] = the id after ids[s] was taken; -1 for a sequence that is not active, which nothing is taken for. `active`
// may be null.
void longest_suffix_step(const StringTrie& suffixes, const uint8_t* ids, const uint8_t* active, const SuffixRing& ring,
                         int32_t* found, int threads);

}  // namespace bytekernels
