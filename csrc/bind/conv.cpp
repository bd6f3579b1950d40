#include "conv.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::conv_bindings {

using OptionalArray = std::optional<Array>;

// T, C, K.
using Sizes = std::tuple<int64_t, int64_t, int64_t>;

// What both directions take: x, weight, bias, silu, initial_states.
using Arguments = std::tuple<RowsArray, Array, OptionalArray, bool, OptionalArray>;

// What backward writes: dx, dweight, dbias, dinitial_states.
using Outputs = std::tuple<Array, Array, OptionalArray, OptionalArray>;

ConvShape conv_shape(const Sizes& sizes, const Array& cu_seqlens) {
  const auto [total, channels, taps] = sizes;
  if (total < 0 || channels < 0) refuse("x must have shape [T, C], got T, C = ", total, ", ", channels);
  if (taps < kLeastTaps || taps > kMostTaps) {
    refuse("weight must have ", kLeastTaps, " to ", kMostTaps, " taps, got ", taps);
  }
  const Offsets checked = offsets(cu_seqlens, total);
  return {checked.cu, checked.sequences, channels, static_cast<int>(taps)};
}

int64_t states(const ConvShape& shape) { return product({shape.sequences, shape.channels, shape.taps - 1}); }

template <class E>
ConvInputs<E> conv_inputs(const Arguments& arguments, const ConvShape& shape, int64_t total) {
  const auto& [x, weight, bias, silu, initial_states] = arguments;
  return {rows<const E>(x, total, shape.channels, "x"),
          pointer<const float>(weight, product({shape.channels, shape.taps}), "weight"),
          optional_pointer<const float>(bias, shape.channels, "bias"), silu,
          optional_pointer<const E>(initial_states, states(shape), "initial_states")};
}

template <class E>
void forward(const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& y,
             const Array& final_states, int threads) {
  const int64_t total = std::get<0>(sizes);
  const ConvShape shape = conv_shape(sizes, cu_seqlens);
  const ConvInputs<E> inputs = conv_inputs<E>(arguments, shape, total);
  E* const out = pointer<E>(y, product({total, shape.channels}), "y");
  E* const last = pointer<E>(final_states, states(shape), "final_states");
  py::gil_scoped_release release;
  conv_forward(shape, inputs, out, last, threads);
}

template <class E>
void backward(const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& dy,
              const Array& dfinal_states, const Outputs& outputs, int threads) {
  const int64_t total = std::get<0>(sizes);
  const ConvShape shape = conv_shape(sizes, cu_seqlens);
  const ConvInputs<E> inputs = conv_inputs<E>(arguments, shape, total);
  const int64_t size = product({total, shape.channels});
  const E* const dout = pointer<const E>(dy, size, "dy");
  const E* const dfinal = pointer<const E>(dfinal_states, states(shape), "dfinal_states");
  const auto& [dx, dweight, dbias, dinitial_states] = outputs;
  const ConvGradients<E> gradients{pointer<E>(dx, size, "dx"),
                                   pointer<float>(dweight, product({shape.channels, shape.taps}), "dweight"),
                                   optional_pointer<float>(dbias, shape.channels, "dbias"),
                                   optional_pointer<float>(dinitial_states, states(shape), "dinitial_states")};
  py::gil_scoped_release release;
  conv_backward(shape, inputs, dout, dfinal, gradients, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "causal_conv1d",
      [](bool narrow, const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& y,
         const Array& final_states, int threads) {
        (narrow ? forward<bf16> : forward<float>)(sizes, cu_seqlens, arguments, y, final_states, threads);
      },
      "bf16"_a, "sizes"_a, "cu_seqlens"_a, "arguments"_a, "y"_a, "final_states"_a, "threads"_a,
      "Writes y and the final states. Sizes: T, C, K.");
  m.def(
      "causal_conv1d_backward",
      [](bool narrow, const Sizes& sizes, const Array& cu_seqlens, const Arguments& arguments, const Array& dy,
         const Array& dfinal_states, const Outputs& outputs, int threads) {
        (narrow ? backward<bf16> : backward<float>)(sizes, cu_seqlens, arguments, dy, dfinal_states, outputs, threads);
      },
      "bf16"_a, "sizes"_a, "cu_seqlens"_a, "arguments"_a, "dy"_a, "dfinal_states"_a, "outputs"_a, "threads"_a,
      "Writes the gradients. Sizes: T, C, K.");
}

}  // namespace bytekernels::conv_bindings
