// The moving average of a sequence's chunks, by tiles aligned to the sequence's start:
//   z_m = w_m c_m + (1 - w_m) z_{m-1},   w = 1 at the first chunk.
//
// Chunk m - j adds to z_m with the factor (1 - w_{m-j+1}) ... (1 - w_m). A tile whose first chunk is hardly reached by
// those a tile's length before it starts afresh from the few that do reach it, so that it can be computed alone; the
// others continue the tile before. Which is which depends on the weights alone, and with it every bit of z.
#pragma once

#include <algorithm>
#include <cmath>

#include "../ragged.h"
#include "../rows.h"
#include "elements.h"

namespace bytekernels {

constexpr int64_t kChunksPerTile = 128;
constexpr float kNegligible = 0x1p-32f;  // a factor, of a chunk in a later one, that float32 does not notice

class Ema {
 public:
  Ema(const float* weight, int64_t width) : weight_(weight), width_(width) {}

  // The first chunk of the tile that chunk m lies in.
  static int64_t tile_of(Range sequence, int64_t m) { return m - (m - sequence.begin) % kChunksPerTile; }

  // The first chunk that reaches chunk m, the first of a tile of the sequence; -1 if it is more than a tile away.
  int64_t reaching(Range sequence, int64_t m) const {
    float factor = 1;
    for (int64_t j = m; j > sequence.begin && j > m - kChunksPerTile;) {
      factor *= 1 - weight_[--j];
      if (std::abs(factor) < kNegligible) return j;
    }
    return m - sequence.begin <= kChunksPerTile ? sequence.begin : -1;
  }

  // z_m [width] from z_{m-1}, which it may be: w c + (z - w z), as 1 - w itself would be rounded alike each time.
  // Never inlined, so that the bits are the same wherever it is called.
  template <class E>
  __attribute__((noinline)) void step(Rows<const E> chunks, Range sequence, int64_t m, const float* before,
                                      float* z) const {
    const E* const c = chunks[m];
    if (m == sequence.begin) {
      across(width_, false, [&](int64_t i, auto part) { part.store(z + i, part.load(c + i)); });
      return;
    }
    const float w = weight_[m];
    across(width_, false, [&](int64_t i, auto part) {
      const Vec old = part.load(before + i);
      part.store(z + i, w * part.load(c + i) + (old - w * old));
    });
  }

  // z_{m-1} for m, the first chunk of a tile but not of the sequence.
  template <class E>
  void before_tile(Rows<const E> chunks, Range sequence, int64_t m, float* z) const {
    int64_t tile = m, first = reaching(sequence, tile);
    while (first < 0) {
      tile -= kChunksPerTile;
      first = reaching(sequence, tile);
    }
    std::fill_n(z, width_, 0.0f);
    for (int64_t j = first; j < m; ++j) step(chunks, sequence, j, z, z);
  }

 private:
  const float* weight_;
  int64_t width_;
};

}  // namespace bytekernels
