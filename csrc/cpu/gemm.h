// Products of small float32 matrices that lie in the caches, all sizes padded to whole vectors.
#pragma once

#include "simd.h"

namespace bytekernels {

// Rows of the register tile; two vectors wide, it fills the target's registers without spilling.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
static_assert(kLanes % kTileRows == 0, "sizes padded to vectors are whole tiles");

// The left factor, a(m, k) = data[m * row + k * column]: either order of storage.
struct Left {
  const float* data;
  int64_t row;
  int64_t column;
};

// The right factor and the product: rows of aligned vectors.
struct Right {
  const float* data;
  int64_t stride;
};

struct Product {
  float* data;
  int64_t stride;
};

// The k that matter for the tile whose first row is m and first column n.
struct AllK {
  int64_t k;
  int64_t begin(int64_t, int64_t) const { return 0; }
  int64_t end(int64_t) const { return k; }
};
struct LowerLeft : AllK {  // a(m, k) = 0 for k > m
  int64_t end(int64_t m) const { return k < m + kTileRows ? k : m + kTileRows; }
};
struct UpperLeft : AllK {  // a(m, k) = 0 for k < m
  int64_t begin(int64_t m, int64_t) const { return m; }
};
struct LowerRight : AllK {  // b(k, n) = 0 for n > k
  int64_t begin(int64_t, int64_t n) const { return n; }
};

namespace detail {

template <int kVectors, bool kFresh>
inline void tile(Left a, Right b, Product out, float keep, int64_t begin, int64_t end) {
  Vec sum[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kFresh ? Vec{} : keep * load(out.data + r * out.stride + v * kLanes);
    }
  }
  const float* left = a.data + begin * a.column;
  const float* right = b.data + begin * b.stride;
  for (int64_t k = begin; k < end; ++k, left += a.column, right += b.stride) {
    Vec column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left[r * a.row] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out.data + r * out.stride + v * kLanes, sum[r][v]);
  }
}

template <bool kFresh, class Span>
inline void multiply(int64_t rows, int64_t columns, Left a, Right b, Product out, float keep, Span span) {
  for (int64_t n = 0; n < columns;) {
    const bool pair = columns - n >= 2 * kLanes;
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const Left left{a.data + m * a.row, a.row, a.column};
      const Right right{b.data + n, b.stride};
      const Product product{out.data + m * out.stride + n, out.stride};
      const int64_t begin = span.begin(m, n), end = span.end(m);
      if (pair) {
        tile<2, kFresh>(left, right, product, keep, begin, end);
      } else {
        tile<1, kFresh>(left, right, product, keep, begin, end);
      }
    }
    n += pair ? 2 * kLanes : kLanes;
  }
}

}  // namespace detail

// out = a b. `rows` is a multiple of kTileRows, `columns` of kLanes. The sum over k runs upwards, whatever the sizes.
template <class Span>
inline void multiply(int64_t rows, int64_t columns, Left a, Right b, Product out, Span span) {
  detail::multiply<true>(rows, columns, a, b, out, 0, span);
}

// out = keep out + a b.
template <class Span>
inline void multiply_add(int64_t rows, int64_t columns, Left a, Right b, Product out, float keep, Span span) {
  detail::multiply<false>(rows, columns, a, b, out, keep, span);
}

}  // namespace bytekernels
