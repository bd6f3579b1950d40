#include "marginals.h"

#include <tuple>

#include "bind/rows.h"
#include "bind/trie.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::marginals_bindings {

// M, V.
using Sizes = std::tuple<int64_t, int64_t>;

// edges, children, order, spans.
using VocabularyArrays = std::tuple<Array, Array, Array, Array>;

void check_within(const int32_t* values, int64_t count, int64_t least, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < least || values[i] >= end) {
      refuse(name, "[", i, "] is ", values[i], ", not in [", least, ", ", end, ")");
    }
  }
}

SortedVocabulary vocabulary_of(const VocabularyArrays& arrays, int64_t columns) {
  const auto& [edges, children, order, spans] = arrays;
  const Trie trie = trie_of(edges, children);
  const int64_t tokens = elements(order, sizeof(int32_t), "order");
  const SortedVocabulary vocabulary{trie, pointer<const int32_t>(order, tokens, "order"), tokens,
                                    pointer<const int32_t>(spans, product({trie.nodes, 3}), "spans")};
  check_within(vocabulary.order, tokens, 0, columns, "order");
  check_within(vocabulary.spans, 3 * trie.nodes, 0, tokens + 1, "spans");
  return vocabulary;
}

template <class E>
void marginals(const Sizes& sizes, const RowsArray& logits, const VocabularyArrays& vocabulary, const Array& chunk_of,
               const Array& prefix, const Array& out, int threads) {
  const auto [chunks, columns] = sizes;
  if (chunks < 0 || columns < 0) refuse("logits must have shape [M, V], got ", chunks, ", ", columns);
  const Rows<const E> from = rows<const E>(logits, chunks, columns, "logits");
  const SortedVocabulary sorted = vocabulary_of(vocabulary, columns);
  const int64_t total = elements(chunk_of, sizeof(int32_t), "chunk_of");
  const MarginalRows asked{pointer<const int32_t>(chunk_of, total, "chunk_of"),
                           pointer<const int32_t>(prefix, total, "prefix"), total};
  check_within(asked.chunk_of, total, -1, chunks, "chunk_of");
  check_within(asked.prefix, total, -1, sorted.trie.nodes, "prefix");
  auto* const to = pointer<float>(out, product({total, kOutcomes}), "out");
  py::gil_scoped_release release;
  byte_marginals(from, chunks, sorted, asked, to, threads);
}

void prefixes(const Array& ids, const Array& cu_seqlens, const Array& boundary, const Array& edges,
              const Array& children, const Array& prefix, int threads) {
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets(cu_seqlens, total);
  const Trie trie = trie_of(edges, children);
  const auto* const bytes = pointer<const uint8_t>(ids, total, "ids");
  const auto* const ends = pointer<const uint8_t>(boundary, total, "boundary");
  auto* const to = pointer<int32_t>(prefix, total, "prefix");
  py::gil_scoped_release release;
  token_prefix(bytes, cuts.cu, cuts.sequences, ends, total, trie, to, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "byte_marginals",
      [](bool narrow, const Sizes& sizes, const RowsArray& logits, const VocabularyArrays& vocabulary,
         const Array& chunk_of, const Array& prefix, const Array& out, int threads) {
        (narrow ? marginals<bf16> : marginals<float>)(sizes, logits, vocabulary, chunk_of, prefix, out, threads);
      },
      "bf16"_a, "sizes"_a, "logits"_a, "vocabulary"_a, "chunk_of"_a, "prefix"_a, "out"_a, "threads"_a,
      "Writes out. Sizes: M, V; vocabulary: edges, children, order, spans.");
  m.def("token_prefix", &prefixes, "ids"_a, "cu_seqlens"_a, "boundary"_a, "edges"_a, "children"_a, "prefix"_a,
        "threads"_a, "Writes prefix.");
}

}  // namespace bytekernels::marginals_bindings
