#include "step.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "conv.h"
#include "cpu/simd.h"

namespace bytekernels::step_bindings {

using OptionalArray = std::optional<Array>;

// S, H, P, G, N, K.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// conv_weight, conv_bias, A, D, dt_bias, norm_weight.
using Parameters = std::tuple<Array, OptionalArray, Array, OptionalArray, OptionalArray, Array>;

// eps, dt_min, dt_max.
using Options = std::tuple<float, float, float>;

// conv, position, ssm.
using State = std::tuple<Array, Array, Array>;

StepShape step_shape(const Sizes& sizes) {
  const auto [sequences, heads, headdim, groups, d_state, taps] = sizes;
  if (sequences < 0 || heads < 1 || headdim < 1 || d_state < 1) {
    refuse("ssm must have shape [S, H, P, N] with H, P, N >= 1, got ", sequences, ", ", heads, ", ", headdim, ", ",
           d_state);
  }
  if (groups < 1 || heads % groups != 0) refuse("the groups must divide ", heads, " heads, got ", groups);
  if (taps < kLeastTaps || taps > kMostTaps) {
    refuse("conv_weight must have ", kLeastTaps, " to ", kMostTaps, " taps, got ", taps);
  }
  for (const int64_t part : {product({heads, headdim}), product({groups, d_state})})
    product({8, part});  // a row's width
  return {sequences, heads, headdim, groups, d_state, static_cast<int>(taps)};
}

template <class E>
void step(const Sizes& sizes, const RowsArray& zxbcdt, const Parameters& parameters, const Options& options,
          const State& state, const OptionalArray& active, const Array& out, int threads) {
  const StepShape shape = step_shape(sizes);
  const auto& [conv_weight, conv_bias, A, D, dt_bias, norm_weight] = parameters;
  const auto [eps, dt_min, dt_max] = options;
  const auto& [conv, position, ssm] = state;
  if (!(0 <= dt_min && dt_min <= dt_max)) {
    refuse("dt_limit must be (least, greatest) with 0 <= least <= greatest, got ", dt_min, ", ", dt_max);
  }
  const StepInputs<E> inputs{rows<const E>(zxbcdt, shape.sequences, shape.width(), "zxbcdt"),
                             pointer<const float>(conv_weight, product({shape.channels(), shape.taps}), "conv_weight"),
                             optional_pointer<const float>(conv_bias, shape.channels(), "conv_bias"),
                             pointer<const float>(A, shape.heads, "A"),
                             optional_pointer<const float>(D, shape.heads, "D"),
                             optional_pointer<const float>(dt_bias, shape.heads, "dt_bias"),
                             pointer<const float>(norm_weight, shape.inner(), "norm_weight"),
                             optional_pointer<const uint8_t>(active, shape.sequences, "active"),
                             eps,
                             dt_min,
                             dt_max};
  const StepState states{
      pointer<float>(conv, product({shape.sequences, shape.channels(), shape.taps}), "conv"),
      pointer<int32_t>(position, product({shape.sequences, shape.heads}), "position"),
      pointer<float>(ssm, product({shape.sequences, shape.heads, shape.headdim, shape.d_state}), "ssm")};
  E* const to = pointer<E>(out, product({shape.sequences, shape.inner()}), "out");
  py::gil_scoped_release release;
  mixer_step(shape, inputs, states, to, threads);
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "mamba2_mixer_step",
      [](bool narrow, const Sizes& sizes, const RowsArray& zxbcdt, const Parameters& parameters, const Options& options,
         const State& state, const OptionalArray& active, const Array& out, int threads) {
        (narrow ? step<bf16> : step<float>)(sizes, zxbcdt, parameters, options, state, active, out, threads);
      },
      "bf16"_a, "sizes"_a, "zxbcdt"_a, "parameters"_a, "options"_a, "state"_a, "active"_a, "out"_a, "threads"_a,
      "Writes out and updates the state of active sequences. Sizes: S, H, P, G, N, K; options: eps, dt_min, dt_max.");
}

}  // namespace bytekernels::step_bindings
