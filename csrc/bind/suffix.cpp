#include "bind/suffix.h"

#include <pybind11/stl.h>

namespace bytekernels::suffix_bindings {

using OptionalArray = std::optional<Array>;

void find(const Array& ids, const Array& cu_seqlens, const OptionalArray& rows, const StringTrieArrays& trie,
          const Array& found, int threads) {
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets(cu_seqlens, total);
  const StringTrie suffixes = string_trie_of(trie);
  const int64_t count = rows ? elements(*rows, sizeof(int32_t), "rows") : total;
  const auto* const asked = optional_pointer<const int32_t>(rows, count, "rows");
  for (int64_t i = 0; asked && i < count; ++i) {
    if (asked[i] < 0 || asked[i] >= total) refuse("rows[", i, "] is ", asked[i], ", but there are ", total, " rows");
  }
  const auto* const bytes = pointer<const uint8_t>(ids, total, "ids");
  auto* const out = pointer<int32_t>(found, count, "found");
  py::gil_scoped_release release;
  longest_suffix(suffixes, bytes, cuts.cu, cuts.sequences, asked, count, out, threads);
}

void step(const Array& ids, const OptionalArray& active, const Array& recent, const Array& counts,
          const StringTrieArrays& trie, const Array& found, int threads) {
  const SuffixRing ring = ring_of(recent, counts);
  const StringTrie suffixes = string_trie_of(trie);
  const auto* const bytes = pointer<const uint8_t>(ids, ring.sequences, "ids");
  const auto* const flags = optional_pointer<const uint8_t>(active, ring.sequences, "active");
  auto* const out = pointer<int32_t>(found, ring.sequences, "found");
  py::gil_scoped_release release;
  longest_suffix_step(suffixes, bytes, flags, ring, out, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("longest_suffix", &find, "ids"_a, "cu_seqlens"_a, "rows"_a, "trie"_a, "found"_a, "threads"_a,
        "Writes found, for the given rows or all. The trie: edges, children, string_ids.");
  m.def("longest_suffix_step", &step, "ids"_a, "active"_a, "recent"_a, "counts"_a, "trie"_a, "found"_a, "threads"_a,
        "Writes found and updates recent and counts of active sequences. The trie: edges, children, string_ids.");
}

}  // namespace bytekernels::suffix_bindings
