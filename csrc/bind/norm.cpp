#include "norm.h"

#include <pybind11/stl.h>

#include "bind/rows.h"
#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::norm_bindings {

using OptionalArray = std::optional<Array>;
using OptionalRows = std::optional<RowsArray>;

// rows, width, group_size, eps.
using Sizes = std::tuple<int64_t, int64_t, int64_t, float>;

NormShape norm_shape(const Sizes& sizes) {
  const auto [rows, width, group_size, eps] = sizes;
  if (rows < 0 || width < 1) refuse("x must have shape [rows, width] with width >= 1, got ", rows, ", ", width);
  if (group_size < 1 || width % group_size != 0) refuse("group_size must divide ", width, ", got ", group_size);
  return {rows, width, group_size, eps};
}

template <class E, class R>
void forward(const Sizes& sizes, const RowsArray& x, const OptionalRows& residual, const Array& weight, const Array& y,
             const OptionalArray& total, int threads) {
  const NormShape shape = norm_shape(sizes);
  const int64_t size = product({shape.rows, shape.width});
  const auto h = rows<const E>(x, shape.rows, shape.width, "x");
  const auto other = rows<const R>(residual, shape.rows, shape.width, "residual");
  const auto* scale = pointer<const float>(weight, shape.width, "weight");
  auto* out = pointer<E>(y, size, "y");
  if (residual.has_value() != total.has_value()) refuse("total must be given exactly where residual is");
  auto* sum = optional_pointer<R>(total, size, "total");
  py::gil_scoped_release release;
  rms_norm(shape, h, other, scale, out, sum, threads);
}

template <class E, class R>
void backward(const Sizes& sizes, const RowsArray& x, const OptionalRows& residual, const Array& weight,
              const Array& dy, const OptionalArray& dtotal, const Array& dx, const OptionalArray& dresidual,
              const Array& dweight, int threads) {
  const NormShape shape = norm_shape(sizes);
  const int64_t size = product({shape.rows, shape.width});
  const auto h = rows<const E>(x, shape.rows, shape.width, "x");
  const auto other = rows<const R>(residual, shape.rows, shape.width, "residual");
  const auto* scale = pointer<const float>(weight, shape.width, "weight");
  const auto* dout = pointer<const E>(dy, size, "dy");
  if (residual.has_value() != dtotal.has_value() || residual.has_value() != dresidual.has_value()) {
    refuse("dtotal and dresidual must be given exactly where residual is");
  }
  const auto* dsum = optional_pointer<const R>(dtotal, size, "dtotal");
  auto* first = pointer<E>(dx, size, "dx");
  auto* second = optional_pointer<R>(dresidual, size, "dresidual");
  auto* third = pointer<float>(dweight, shape.width, "dweight");
  py::gil_scoped_release release;
  rms_norm_backward(shape, h, other, scale, dout, dsum, first, second, third, threads);
}

template <class E>
void gated_forward(const Sizes& sizes, const RowsArray& y, const RowsArray& z, const Array& weight, const Array& out,
                   int threads) {
  const NormShape shape = norm_shape(sizes);
  const auto h = rows<const E>(y, shape.rows, shape.width, "y");
  const auto gate = rows<const E>(z, shape.rows, shape.width, "z");
  const auto* scale = pointer<const float>(weight, shape.width, "weight");
  auto* to = pointer<E>(out, product({shape.rows, shape.width}), "out");
  py::gil_scoped_release release;
  gated_rms_norm(shape, h, gate, scale, to, threads);
}

template <class E>
void gated_backward(const Sizes& sizes, const RowsArray& y, const RowsArray& z, const Array& weight, const Array& dout,
                    const Array& dy, const Array& dz, const Array& dweight, int threads) {
  const NormShape shape = norm_shape(sizes);
  const int64_t size = product({shape.rows, shape.width});
  const auto h = rows<const E>(y, shape.rows, shape.width, "y");
  const auto gate = rows<const E>(z, shape.rows, shape.width, "z");
  const auto* scale = pointer<const float>(weight, shape.width, "weight");
  const auto* given = pointer<const E>(dout, size, "dout");
  auto* first = pointer<E>(dy, size, "dy");
  auto* second = pointer<E>(dz, size, "dz");
  auto* third = pointer<float>(dweight, shape.width, "dweight");
  py::gil_scoped_release release;
  gated_rms_norm_backward(shape, h, gate, scale, given, first, second, third, threads);
}

// Of three instances of a function, the one for these dtypes.
template <class Function>
Function pick(bool narrow, bool narrow_residual, Function wide, Function mixed, Function all_narrow) {
  if (!narrow && narrow_residual) refuse("a bfloat16 residual goes with a bfloat16 x");
  return !narrow ? wide : narrow_residual ? all_narrow : mixed;
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  // The residual is None for the norm of x alone; its dtype is then x's.
  m.def(
      "rms_norm",
      [](bool narrow, bool narrow_residual, const Sizes& sizes, const RowsArray& x, const OptionalRows& residual,
         const Array& weight, const Array& y, const OptionalArray& total, int threads) {
        pick(narrow, narrow_residual, &forward<float, float>, &forward<bf16, float>, &forward<bf16, bf16>)(
            sizes, x, residual, weight, y, total, threads);
      },
      "bf16"_a, "bf16_residual"_a, "sizes"_a, "x"_a, "residual"_a, "weight"_a, "y"_a, "total"_a, "threads"_a,
      "Writes y and total. Sizes: rows, width, group_size, eps.");
  m.def(
      "rms_norm_backward",
      [](bool narrow, bool narrow_residual, const Sizes& sizes, const RowsArray& x, const OptionalRows& residual,
         const Array& weight, const Array& dy, const OptionalArray& dtotal, const Array& dx,
         const OptionalArray& dresidual, const Array& dweight, int threads) {
        pick(narrow, narrow_residual, &backward<float, float>, &backward<bf16, float>, &backward<bf16, bf16>)(
            sizes, x, residual, weight, dy, dtotal, dx, dresidual, dweight, threads);
      },
      "bf16"_a, "bf16_residual"_a, "sizes"_a, "x"_a, "residual"_a, "weight"_a, "dy"_a, "dtotal"_a, "dx"_a,
      "dresidual"_a, "dweight"_a, "threads"_a, "Writes the gradients. Sizes: rows, width, group_size, eps.");
  m.def(
      "gated_rms_norm",
      [](bool narrow, const Sizes& sizes, const RowsArray& y, const RowsArray& z, const Array& weight, const Array& out,
         int threads) { (narrow ? gated_forward<bf16> : gated_forward<float>)(sizes, y, z, weight, out, threads); },
      "bf16"_a, "sizes"_a, "y"_a, "z"_a, "weight"_a, "out"_a, "threads"_a,
      "Writes out. Sizes: rows, width, group_size, eps.");
  m.def(
      "gated_rms_norm_backward",
      [](bool narrow, const Sizes& sizes, const RowsArray& y, const RowsArray& z, const Array& weight,
         const Array& dout, const Array& dy, const Array& dz, const Array& dweight, int threads) {
        (narrow ? gated_backward<bf16> : gated_backward<float>)(sizes, y, z, weight, dout, dy, dz, dweight, threads);
      },
      "bf16"_a, "sizes"_a, "y"_a, "z"_a, "weight"_a, "dout"_a, "dy"_a, "dz"_a, "dweight"_a, "threads"_a,
      "Writes the gradients. Sizes: rows, width, group_size, eps.");
}

}  // namespace bytekernels::norm_bindings
