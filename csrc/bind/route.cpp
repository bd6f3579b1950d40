#include "route.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::route_bindings {

using OptionalArray = std::optional<Array>;

// What a layout is written to: chunk_of, index, cu_chunks.
using LayoutArrays = std::tuple<Array, Array, Array>;

RouteShape route_shape(const Array& cu_seqlens, int64_t total) {
  if (total < 0) refuse("T must be at least 0, got ", total);
  const Offsets checked = offsets(cu_seqlens, total);
  return {checked.cu, checked.sequences, total};
}

Layout layout_of(const LayoutArrays& arrays, const RouteShape& shape) {
  const auto& [chunk_of, index, cu_chunks] = arrays;
  const int64_t room = elements(index, sizeof(int32_t), "index");
  return {pointer<int32_t>(chunk_of, shape.rows, "chunk_of"), pointer<int32_t>(index, room, "index"), room,
          pointer<int32_t>(cu_chunks, shape.sequences + 1, "cu_chunks")};
}

template <class E>
int64_t forward(int64_t total, int64_t width, const Array& cu_seqlens, bool lookahead, const RowsArray& q,
                const RowsArray& k, const OptionalArray& required, const Array& prob, const Array& boundary,
                const LayoutArrays& layout, int threads) {
  const RouteShape shape = route_shape(cu_seqlens, total);
  const auto left = rows<const E>(q, total, width, "q");
  const auto right = rows<const E>(k, total, width, "k");
  const auto* flags = optional_pointer<const uint8_t>(required, total, "required");
  auto* p = pointer<float>(prob, total, "prob");
  auto* hard = pointer<uint8_t>(boundary, total, "boundary");
  const Layout to = layout_of(layout, shape);
  py::gil_scoped_release release;
  return route(shape, width, lookahead, left, right, flags, p, hard, to, threads);
}

template <class E>
void backward(int64_t total, int64_t width, const Array& cu_seqlens, bool lookahead, const Array& dprob,
              const RowsArray& q, const RowsArray& k, const Array& dq, const Array& dk, int threads) {
  const RouteShape shape = route_shape(cu_seqlens, total);
  const auto* given = pointer<const float>(dprob, total, "dprob");
  const auto left = rows<const E>(q, total, width, "q");
  const auto right = rows<const E>(k, total, width, "k");
  auto* first = pointer<E>(dq, product({total, width}), "dq");
  auto* second = pointer<E>(dk, product({total, width}), "dk");
  py::gil_scoped_release release;
  route_backward(shape, width, lookahead, given, left, right, first, second, threads);
}

int64_t layout(int64_t total, const Array& cu_seqlens, const Array& boundary, const LayoutArrays& arrays, int threads) {
  const RouteShape shape = route_shape(cu_seqlens, total);
  const auto* hard = pointer<const uint8_t>(boundary, total, "boundary");
  const Layout to = layout_of(arrays, shape);
  py::gil_scoped_release release;
  return chunk_layout(shape, hard, to, threads);
}

void gather(int64_t total, int64_t row_bytes, const Array& index, const RowsArray& h, const Array& out, int threads) {
  const int64_t count = elements(index, sizeof(int32_t), "index");
  const auto* from = pointer<const int32_t>(index, count, "index");
  for (int64_t m = 0; m < count; ++m) {
    if (from[m] >= total) refuse("index must be below ", total, ", the number of rows, got ", from[m], " at ", m);
  }
  const auto source = rows<const uint8_t>(h, total, row_bytes, "h");
  auto* to = pointer<uint8_t>(out, product({count, row_bytes}), "out");
  py::gil_scoped_release release;
  gather_chunks(from, count, row_bytes, source, to, threads);
}

void gather_backward(int64_t row_bytes, const Array& index, const Array& chunk_of, const Array& de, const Array& dh,
                     int threads) {
  const int64_t count = elements(index, sizeof(int32_t), "index");
  const int64_t total = elements(chunk_of, sizeof(int32_t), "chunk_of");
  const auto* from = pointer<const int32_t>(index, count, "index");
  const auto* newest = pointer<const int32_t>(chunk_of, total, "chunk_of");
  const auto* given = pointer<const uint8_t>(de, product({count, row_bytes}), "de");
  auto* to = pointer<uint8_t>(dh, product({total, row_bytes}), "dh");
  py::gil_scoped_release release;
  gather_chunks_backward(from, count, newest, total, row_bytes, given, to, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "route",
      [](bool narrow, int64_t total, int64_t width, const Array& cu_seqlens, bool lookahead, const RowsArray& q,
         const RowsArray& k, const OptionalArray& required, const Array& prob, const Array& boundary,
         const LayoutArrays& layout, int threads) {
        return (narrow ? forward<bf16> : forward<float>)(total, width, cu_seqlens, lookahead, q, k, required, prob,
                                                         boundary, layout, threads);
      },
      "bf16"_a, "total"_a, "width"_a, "cu_seqlens"_a, "lookahead"_a, "q"_a, "k"_a, "required"_a, "prob"_a, "boundary"_a,
      "layout"_a, "threads"_a, "Writes prob, boundary and the layout (chunk_of, index, cu_chunks); returns M.");
  m.def(
      "route_backward",
      [](bool narrow, int64_t total, int64_t width, const Array& cu_seqlens, bool lookahead, const Array& dprob,
         const RowsArray& q, const RowsArray& k, const Array& dq, const Array& dk, int threads) {
        (narrow ? backward<bf16> : backward<float>)(total, width, cu_seqlens, lookahead, dprob, q, k, dq, dk, threads);
      },
      "bf16"_a, "total"_a, "width"_a, "cu_seqlens"_a, "lookahead"_a, "dprob"_a, "q"_a, "k"_a, "dq"_a, "dk"_a,
      "threads"_a, "Writes dq and dk.");
  m.def("chunk_layout", &layout, "total"_a, "cu_seqlens"_a, "boundary"_a, "layout"_a, "threads"_a,
        "Writes the layout (chunk_of, index, cu_chunks); returns M.");
  m.def("gather_chunks", &gather, "total"_a, "row_bytes"_a, "index"_a, "h"_a, "out"_a, "threads"_a,
        "Writes the row of h at each index, zeros at a negative one.");
  m.def("gather_chunks_backward", &gather_backward, "row_bytes"_a, "index"_a, "chunk_of"_a, "de"_a, "dh"_a, "threads"_a,
        "Writes row m of de to the byte that index[m] names, zeros to the others.");
}

}  // namespace bytekernels::route_bindings
