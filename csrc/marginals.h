// The byte marginals of a token model, and the nodes that they are asked for at (bytekernels/marginals/reference.py
// says what is computed).
#pragma once

#include "rows.h"
#include "trie.h"

namespace bytekernels {

constexpr int64_t kOutcomes = 512;  // bytes with their chunk going on, then bytes that end it

// A vocabulary in the order of its strings, in which those that begin with a node's string lie together, its own first.
struct SortedVocabulary {
  Trie trie;
  const int32_t* order;  // [tokens], the column of each, all different
  int64_t tokens;
  const int32_t* spans;  // [nodes, 3]: a node's own strings are [first, own end), the longer ones [own end, end)
};

// What a row of byte marginals is asked for: chunk_of in [-1, chunks) and prefix in [-1, nodes), each [total].
struct MarginalRows {
  const int32_t* chunk_of;
  const int32_t* prefix;
  int64_t total;
};

// Writes out [total, kOutcomes]. E is float or bf16; logits are `chunks` rows.
template <class E>
void byte_marginals(const Rows<const E>& logits, int64_t chunks, const SortedVocabulary& vocabulary,
                    const MarginalRows& rows, float* out, int threads);

// prefix[t] = the node of the bytes since the newest boundary at or before t in its sequence, -1 where there is none.
void token_prefix(const uint8_t* ids, const int32_t* cu, int64_t sequences, const uint8_t* boundary, int64_t total,
                  const Trie& trie, int32_t* prefix, int threads);

}  // namespace bytekernels
