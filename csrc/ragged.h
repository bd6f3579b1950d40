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

constexpr int64_t kIgnore = -100;  // a target that no loss counts
constexpr int kNoBos = -1;         // in place of the byte that begins every sequence, where none does

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

// The offsets in other units: sequence s starts at cu[s] * scale + s * shift.
struct Starts {
  const int32_t* cu;
  int64_t scale;
  int64_t shift;

  RAGGED_INLINE int64_t operator[](int64_t s) const { return cu[s] * scale + s * shift; }
};

// In what follows `cu` is a pointer to offsets, or Starts.

// First sequence whose start is at or after `row`: in [0, sequences], non-decreasing in `row`.
template <class Cu>
RAGGED_INLINE int64_t first_starting_at(const Cu& cu, int64_t sequences, int64_t row) {
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

// The last sequence in [low, high) that starts at or before `row`, which `low` is taken to do.
template <class Cu>
RAGGED_INLINE int64_t last_starting_by(const Cu& cu, int64_t low, int64_t high, int64_t row) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (cu[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence that `row` belongs to, 0 <= row < total: never an empty one. `from`: a sequence that starts at or
// before the row, so that near ones are found in few steps; -1 where none is known.
template <class Cu>
RAGGED_INLINE int64_t sequence_of(const Cu& cu, int64_t sequences, int64_t row, int64_t from = -1) {
  if (from < 0) return last_starting_by(cu, 0, sequences, row);
  int64_t step = 1;
  while (from + step < sequences && cu[from + step] <= row) {
    from += step;
    step *= 2;
  }
  return last_starting_by(cu, from, from + step < sequences ? from + step : sequences, row);
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

// Which items each thread of a CUDA launch serves: every item of [0, items) is served once, for any number of blocks.
//
// Items are cut into tiles of kThreads * kItems. A block has a tile, and every `blocks`-th after it; in a tile a thread
// serves every kThreads-th item, so that the threads of a warp touch neighbours.
struct Grid {
  static constexpr int64_t kThreads = 256;
  static constexpr int64_t kItems = 4;
  static constexpr int64_t kTile = kThreads * kItems;
  static constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // that CUDA launches

  int64_t items;
  int64_t blocks;

  static Grid over(int64_t items, int64_t most_blocks = kMostBlocks) {
    const int64_t tiles = (items + kTile - 1) / kTile;
    return {items, tiles < most_blocks ? tiles : most_blocks};
  }

  // The first item of a thread, at or past `items` where it has none.
  RAGGED_INLINE int64_t first(int64_t block, int64_t thread) const { return block * kTile + thread; }

  // The one that the same thread serves after `item`.
  RAGGED_INLINE int64_t next(int64_t item) const {
    const bool last_of_tile = item % kTile >= kTile - kThreads;
    return item + kThreads + (last_of_tile ? (blocks - 1) * kTile : 0);
  }
};

}  // namespace bytekernels
