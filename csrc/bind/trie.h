// A trie as Python passes it.
#pragma once

#include <tuple>

#include "../trie.h"
#include "bindings.h"

namespace bytekernels {

// The arrays as a tree of as many nodes as there are edges.
//
// Raises ValueError where there is none, or `children` has another size.
inline Trie trie_of(const Array& edges, const Array& children) {
  const int64_t nodes = elements(edges, sizeof(int32_t), "edges");
  if (nodes == 0) refuse("edges must have at least one element, the root's, got none");
  return {pointer<const int32_t>(edges, nodes, "edges"), pointer<const int32_t>(children, nodes + 1, "children"),
          nodes};
}

// edges, children, string_ids.
using StringTrieArrays = std::tuple<Array, Array, Array>;

inline StringTrie string_trie_of(const StringTrieArrays& arrays) {
  const auto& [edges, children, string_ids] = arrays;
  const Trie trie = trie_of(edges, children);
  return {trie, pointer<const int32_t>(string_ids, trie.nodes, "string_ids")};
}

}  // namespace bytekernels
