#include "sample.h"

#include "bindings.h"

namespace bytekernels::sample_bindings {

// S, V.
using Sizes = std::tuple<int64_t, int64_t>;

// temperature, top_k, top_p, min_p.
using Settings = std::tuple<Array, Array, Array, Array>;

void draw(const Sizes& sizes, const Array& logits, const Array& seeds, const Array& counters, const Settings& settings,
          const Array& drawn, int threads) {
  const auto [rows, vocabulary] = sizes;
  if (rows < 0 || vocabulary < 1 || vocabulary > INT32_MAX) {
    refuse("logits must have shape [S, V] with 1 <= V < 2^31, got ", rows, ", ", vocabulary);
  }
  const auto& [temperature, top_k, top_p, min_p] = settings;
  const SampleInputs inputs{pointer<const float>(logits, product({rows, vocabulary}), "logits"),
                            pointer<const int64_t>(seeds, rows, "seeds"),
                            pointer<const int64_t>(counters, rows, "counters"),
                            pointer<const float>(temperature, rows, "temperature"),
                            pointer<const int32_t>(top_k, rows, "top_k"),
                            pointer<const float>(top_p, rows, "top_p"),
                            pointer<const float>(min_p, rows, "min_p")};
  int64_t* const to = pointer<int64_t>(drawn, rows, "drawn");
  py::gil_scoped_release release;
  sample(rows, vocabulary, inputs, to, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("sample", &draw, "sizes"_a, "logits"_a, "seeds"_a, "counters"_a, "settings"_a, "drawn"_a, "threads"_a,
        "Writes drawn. Sizes: S, V; settings: temperature, top_k, top_p, min_p.");
}

}  // namespace bytekernels::sample_bindings
