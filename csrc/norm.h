// Root-mean-square norms (bytekernels/norm/reference.py says what is computed).
#pragma once

#include <cstdint>

#include "rows.h"

namespace bytekernels {

struct NormShape {
  int64_t rows;
  int64_t width;
  int64_t group_size;  // divides width: elements that are normalised together
  float eps;
};

// E and R are float or bf16; outputs are contiguous. Sums over rows are in an order that the shape alone decides.

// y [rows, width] = norm(x + residual) and total = the sum, rounded to R; without a residual, data null, y = norm(x).
template <class E, class R>
void rms_norm(const NormShape& shape, Rows<const E> x, Rows<const R> residual, const float* weight, E* y, R* total,
              int threads);

// Gradients, given those of y and total. dtotal and dresidual are null where the residual is.
template <class E, class R>
void rms_norm_backward(const NormShape& shape, Rows<const E> x, Rows<const R> residual, const float* weight,
                       const E* dy, const R* dtotal, E* dx, R* dresidual, float* dweight, int threads);

// out [rows, width] = norm(y silu(z)). It may be y.
template <class E>
void gated_rms_norm(const NormShape& shape, Rows<const E> y, Rows<const E> z, const float* weight, E* out, int threads);

template <class E>
void gated_rms_norm_backward(const NormShape& shape, Rows<const E> y, Rows<const E> z, const float* weight,
                             const E* dout, E* dy, E* dz, float* dweight, int threads);

}  // namespace bytekernels
