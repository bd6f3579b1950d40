// A vocabulary as a tree of bytes in flat arrays (bytekernels/trie.py), walked on the CPU and on the device alike.
#pragma once

#include <cstdint>

#include "ragged.h"

namespace bytekernels {

// Whatever the arrays hold, a walk reads within them and ends: a child's number is above its parent's.
struct Trie {
  const int32_t* edges;     // [nodes], 256 * parent + byte, ascending
  const int32_t* children;  // [nodes + 1], the children of node n are children[n] to children[n + 1]
  int64_t nodes;            // at least 1, the root

  RAGGED_INLINE Range children_of(int64_t node) const {
    const int64_t begin = children[node];
    const int64_t end = children[node + 1];
    return {begin > node ? begin : node + 1, end < nodes ? end : nodes};
  }

  // The node below `node`, which is one, by a byte; -1 where there is none.
  RAGGED_INLINE int64_t child(int64_t node, uint8_t byte) const {
    const Range range = children_of(node);
    if (range.size() == 256) return range.begin + byte;
    const int64_t wanted = 256 * node + byte;
    if (range.size() <= 0) return -1;
    // The last edge at or before the wanted one, by steps without a branch: which way they go can't be foretold.
    const int32_t* edge = edges + range.begin;
    for (int64_t left = range.size(); left > 1; left -= left / 2) {
      const int64_t half = left / 2;
      edge = edge[half] <= wanted ? edge + half : edge;
    }
    return *edge == wanted ? edge - edges : -1;
  }
};

// A tree that knows its strings.
struct StringTrie {
  Trie trie;
  const int32_t* ids;  // [nodes], of the string that ends at each node, -1 if none
};

}  // namespace bytekernels
