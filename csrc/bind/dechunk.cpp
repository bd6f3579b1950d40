#include "dechunk.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::dechunk_bindings {

using OptionalArray = std::optional<Array>;
using OptionalRows = std::optional<RowsArray>;

// chunk_of, index, cu_chunks.
using Routing = std::tuple<Array, Array, Array>;

// What backward writes: dchunks, dweight, dnull, dconfidence.
using Outputs = std::tuple<Array, OptionalArray, OptionalArray, OptionalArray>;

DechunkShape dechunk_shape(const Routing& routing, int64_t width) {
  const auto& [chunk_of, index, cu_chunks] = routing;
  const int64_t total = elements(chunk_of, sizeof(int32_t), "chunk_of");
  const int64_t room = elements(index, sizeof(int32_t), "index");
  const int64_t count = elements(cu_chunks, sizeof(int32_t), "cu_chunks");
  if (count == 0) refuse("cu_chunks must have S + 1 elements, got none");
  const auto* cu = pointer<const int32_t>(cu_chunks, count, "cu_chunks");
  const Offsets checked = offsets(cu_chunks, cu[count - 1], "cu_chunks");
  const DechunkShape shape{pointer<const int32_t>(chunk_of, total, "chunk_of"),
                           pointer<const int32_t>(index, room, "index"),
                           checked.cu,
                           checked.sequences,
                           total,
                           room,
                           width};
  for (int64_t m = 0; m < shape.held(); ++m) {
    if (shape.index[m] < 0 || shape.index[m] >= total) {
      refuse("index must lie in [0, ", total, "), got ", shape.index[m], " for chunk ", m);
    }
  }
  return shape;
}

template <class E, class R>
void forward(int64_t width, const Routing& routing, const RowsArray& chunks, const OptionalArray& weight,
             const OptionalArray& null, const OptionalRows& residual, const Array& out, int threads) {
  const DechunkShape shape = dechunk_shape(routing, width);
  const auto c = rows<const E>(chunks, shape.room, width, "chunks");
  const auto* w = optional_pointer<const float>(weight, shape.room, "weight");
  const auto* before = optional_pointer<const float>(null, width, "null");
  const auto other = rows<const R>(residual, shape.rows, width, "residual");
  auto* u = pointer<Wider<E, R>>(out, product({shape.rows, width}), "out");
  py::gil_scoped_release release;
  dechunk(shape, c, w, before, other, u, threads);
}

template <class E, class U>
void backward(int64_t width, const Routing& routing, const RowsArray& chunks, const OptionalArray& weight,
              const OptionalArray& null, const Array& du, const Outputs& outputs, int threads) {
  const DechunkShape shape = dechunk_shape(routing, width);
  const auto c = rows<const E>(chunks, shape.room, width, "chunks");
  const auto* w = optional_pointer<const float>(weight, shape.room, "weight");
  const auto* before = optional_pointer<const float>(null, width, "null");
  const auto* given = pointer<const U>(du, product({shape.rows, width}), "du");
  const auto& [dchunks, dweight, dnull, dconfidence] = outputs;
  if (dweight.has_value() != weight.has_value() || dnull.has_value() != null.has_value()) {
    refuse("dweight and dnull must be given exactly where weight and null are");
  }
  const DechunkGradients<E> gradients{pointer<E>(dchunks, product({shape.room, width}), "dchunks"),
                                      optional_pointer<float>(dweight, shape.room, "dweight"),
                                      optional_pointer<float>(dnull, width, "dnull"),
                                      optional_pointer<float>(dconfidence, shape.rows, "dconfidence")};
  py::gil_scoped_release release;
  dechunk_backward(shape, c, w, before, given, gradients, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "dechunk",
      [](bool narrow, bool narrow_residual, int64_t width, const Routing& routing, const RowsArray& chunks,
         const OptionalArray& weight, const OptionalArray& null, const OptionalRows& residual, const Array& out,
         int threads) {
        auto* const wide_chunks = narrow_residual ? &forward<float, bf16> : &forward<float, float>;
        auto* const narrow_chunks = narrow_residual ? &forward<bf16, bf16> : &forward<bf16, float>;
        (narrow ? narrow_chunks : wide_chunks)(width, routing, chunks, weight, null, residual, out, threads);
      },
      "bf16"_a, "bf16_residual"_a, "width"_a, "routing"_a, "chunks"_a, "weight"_a, "null"_a, "residual"_a, "out"_a,
      "threads"_a, "Writes out, bfloat16 where chunks and residual are. Routing: chunk_of, index, cu_chunks.");
  m.def(
      "dechunk_backward",
      [](bool narrow, bool narrow_du, int64_t width, const Routing& routing, const RowsArray& chunks,
         const OptionalArray& weight, const OptionalArray& null, const Array& du, const Outputs& outputs, int threads) {
        if (narrow_du && !narrow) refuse("a bfloat16 du goes with bfloat16 chunks");
        auto* const narrow_chunks = narrow_du ? &backward<bf16, bf16> : &backward<bf16, float>;
        (narrow ? narrow_chunks : &backward<float, float>)(width, routing, chunks, weight, null, du, outputs, threads);
      },
      "bf16"_a, "bf16_du"_a, "width"_a, "routing"_a, "chunks"_a, "weight"_a, "null"_a, "du"_a, "outputs"_a, "threads"_a,
      "Writes dchunks, dweight, dnull, dconfidence. Routing: chunk_of, index, cu_chunks.");
}

}  // namespace bytekernels::dechunk_bindings
