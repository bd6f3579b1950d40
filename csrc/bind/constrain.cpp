#include "bind/constrain.h"

namespace bytekernels::constrain_bindings {

void constrain(const Array& ids, const Array& cu_seqlens, const Array& log_odds, const Array& given,
               const StringTrieArrays& trie, const Array& ends, int threads) {
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets(cu_seqlens, total);
  const ConstrainedText text = constrained_text_of(trie, ids, log_odds, total);
  const auto* const context = pointer<const int32_t>(given, cuts.sequences, "given");
  auto* const out = pointer<uint8_t>(ends, total, "ends");
  py::gil_scoped_release release;
  constrain_ends(text, cuts.cu, context, cuts.sequences, total, out, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("constrain_ends", &constrain, "ids"_a, "cu_seqlens"_a, "log_odds"_a, "given"_a, "trie"_a, "ends"_a, "threads"_a,
        "Writes ends. The trie: edges, children, string_ids.");
}

}  // namespace bytekernels::constrain_bindings
