#include "ssd.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::ssd_bindings {

using OptionalArray = std::optional<Array>;
using OptionalRows = std::optional<RowsArray>;

// T, H, P, G, N.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

ScanShape scan_shape(const Sizes& sizes, const Array& cu_seqlens) {
  const auto [total, heads, headdim, groups, d_state] = sizes;
  if (total < 0 || heads < 1 || headdim < 1 || d_state < 1) {
    refuse("x must have shape [T, H, P] and B [T, G, N] with H, P, N >= 1, got T, H, P, N = ", total, ", ", heads, ", ",
           headdim, ", ", d_state);
  }
  if (groups < 1 || heads % groups != 0) refuse("the groups of B must divide ", heads, " heads, got ", groups);
  const Offsets checked = offsets(cu_seqlens, total);
  return {checked.cu, checked.sequences, heads, headdim, groups, d_state};
}

int64_t states(const ScanShape& shape) { return product({shape.sequences, shape.heads, shape.headdim, shape.d_state}); }

// What both directions take: x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states.
using Arguments = std::tuple<RowsArray, RowsArray, Array, RowsArray, RowsArray, OptionalArray, OptionalRows,
                             OptionalArray, bool, float, float, OptionalArray>;

// What backward writes: dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states.
using Outputs =
    std::tuple<Array, Array, Array, Array, Array, OptionalArray, OptionalArray, OptionalArray, OptionalArray>;

template <class E>
ScanInputs<E> scan_inputs(const Arguments& arguments, const ScanShape& shape, int64_t total) {
  const auto& [x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states] = arguments;
  if (!(0 <= dt_min && dt_min <= dt_max)) {
    refuse("dt_limit must be (least, greatest) with 0 <= least <= greatest, got ", dt_min, ", ", dt_max);
  }
  const int64_t width = product({shape.heads, shape.headdim}), read = product({shape.groups, shape.d_state});
  return {rows<const E>(x, total, width, "x"),
          rows<const float>(dt, total, shape.heads, "dt"),
          pointer<const float>(A, shape.heads, "A"),
          rows<const E>(B, total, read, "B"),
          rows<const E>(C, total, read, "C"),
          optional_pointer<const float>(D, shape.heads, "D"),
          rows<const E>(z, total, width, "z"),
          optional_pointer<const float>(dt_bias, shape.heads, "dt_bias"),
          dt_softplus,
          dt_min,
          dt_max,
          optional_pointer<const float>(initial_states, states(shape), "initial_states")};
}

template <class E>
ScanGradients<E> scan_gradients(const Outputs& outputs, const Arguments& arguments, const ScanShape& shape,
                                int64_t total) {
  const auto& [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states] = outputs;
  if (dz.has_value() != std::get<6>(arguments).has_value()) refuse("dz must be given exactly where z is");
  const int64_t width = product({shape.heads, shape.headdim}), read = product({shape.groups, shape.d_state});
  return {pointer<E>(dx, product({total, width}), "dx"),
          pointer<float>(ddt, product({total, shape.heads}), "ddt"),
          pointer<float>(dA, shape.heads, "dA"),
          pointer<E>(dB, product({total, read}), "dB"),
          pointer<E>(dC, product({total, read}), "dC"),
          optional_pointer<float>(dD, shape.heads, "dD"),
          optional_pointer<E>(dz, product({total, width}), "dz"),
          optional_pointer<float>(ddt_bias, shape.heads, "ddt_bias"),
          optional_pointer<float>(dinitial_states, states(shape), "dinitial_states")};
}

template <class E>
void forward(const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& y,
             const Array& final_states, int threads) {
  const int64_t total = std::get<0>(sizes);
  const ScanShape shape = scan_shape(sizes, cu_seqlens);
  const ScanInputs<E> inputs = scan_inputs<E>(arguments, shape, total);
  E* const out = pointer<E>(y, product({total, shape.heads, shape.headdim}), "y");
  float* const last = pointer<float>(final_states, states(shape), "final_states");
  py::gil_scoped_release release;
  ssd_forward(shape, inputs, out, last, threads);
}

template <class E>
void backward(const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& dy,
              const Array& dfinal_states, const Outputs& outputs, int threads) {
  const int64_t total = std::get<0>(sizes);
  const ScanShape shape = scan_shape(sizes, cu_seqlens);
  const ScanInputs<E> inputs = scan_inputs<E>(arguments, shape, total);
  const ScanGradients<E> gradients = scan_gradients<E>(outputs, arguments, shape, total);
  const E* const dout = pointer<const E>(dy, product({total, shape.heads, shape.headdim}), "dy");
  const float* const dfinal = pointer<const float>(dfinal_states, states(shape), "dfinal_states");
  py::gil_scoped_release release;
  ssd_backward(shape, inputs, dout, dfinal, gradients, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "ssd_scan",
      [](bool narrow, const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& y,
         const Array& final_states, int threads) {
        (narrow ? forward<bf16> : forward<float>)(sizes, cu_seqlens, arguments, y, final_states, threads);
      },
      "bf16"_a, "sizes"_a, "cu_seqlens"_a, "arguments"_a, "y"_a, "final_states"_a, "threads"_a,
      "Writes y and the final states. Sizes: T, H, P, G, N.");
  m.def(
      "ssd_scan_backward",
      [](bool narrow, const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& dy,
         const Array& dfinal_states, const Outputs& outputs, int threads) {
        (narrow ? backward<bf16> : backward<float>)(sizes, cu_seqlens, arguments, dy, dfinal_states, outputs, threads);
      },
      "bf16"_a, "sizes"_a, "cu_seqlens"_a, "arguments"_a, "dy"_a, "dfinal_states"_a, "outputs"_a, "threads"_a,
      "Writes the gradients. Sizes: T, H, P, G, N.");
}

}  // namespace bytekernels::ssd_bindings
