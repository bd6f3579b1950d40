#include "bind/constrain.h"

namespace bytekernels::constrain_bindings {

void constrain(const Array& ids, const Array& cu_seqlens, const Array& boundary, const StringTrieArrays& trie,
               const Array& ends, int threads) {
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets(cu_seqlens, total);
  const ConstrainedText text = constrained_text_of(trie, ids, boundary, total);
  auto* const out = pointer<uint8_t>(ends, total, "ends");
  py::gil_scoped_release release;
  constrain_ends(text, cuts.cu, cuts.sequences, total, out, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("constrain_ends", &constrain, "ids"_a, "cu_seqlens"_a, "boundary"_a, "trie"_a, "ends"_a, "threads"_a,
        "Writes ends. The trie: edges, children, string_ids.");
}

}  // namespace bytekernels::constrain_bindings
