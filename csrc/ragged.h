// Index arithmetic of packed batches, shared by the CPU loops and the CUDA kernels.
//
// A packed batch is a flat axis of `total` rows and `sequences + 1` offsets `cu`:
// cu[0] = 0, cu[s] <= cu[s + 1], cu[sequences] = total. Empty sequences are legal.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RAGGED_INLINE __host__ __device__ inline
#else
#define RAGGED_INLINE inline
#endif

namespace bytekernels {

// Rows [begin, end).
struct Range {
  int64_t begin;
  int64_t end;

  RAGGED_INLINE int64_t size() const { return end - begin; }
};

// Share `index` of `shares` nearly equal contiguous parts of [0, n): every element is in exactly one.
RAGGED_INLINE Range share_of(int64_t n, int64_t shares, int64_t index) {
  const int64_t base = n / shares;
  const int64_t longer = n % shares;  // the first `longer` shares hold one element more
  const int64_t begin = index * base + (index < longer ? index : longer);
  return {begin, begin + base + (index < longer ? 1 : 0)};
}

// First sequence whose start is at or after `row`: in [0, sequences], non-decreasing in `row`.
RAGGED_INLINE int64_t first_starting_at(const int32_t* cu, int64_t sequences, int64_t row) {
  int64_t low = 0;
  int64_t high = sequences;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cu[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence that `row` belongs to, 0 <= row < total: never an empty one.
RAGGED_INLINE int64_t sequence_of(const int32_t* cu, int64_t sequences, int64_t row) {
  return first_starting_at(cu, sequences, row + 1) - 1;
}

// First index at which the offsets break the rules above, -1 if nowhere: 0 for cu[0] != 0,
// s + 1 for cu[s + 1] < cu[s], `sequences` for cu[sequences] != total.
RAGGED_INLINE int64_t first_malformed(const int32_t* cu, int64_t sequences, int64_t total) {
  if (cu[0] != 0) return 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (cu[s + 1] < cu[s]) return s + 1;
  }
  return cu[sequences] == total ? -1 : sequences;
}

}  // namespace bytekernels
