// The gradients of dechunk. With dz_m the sum of du over chunk m's bytes,
//   g_m = dz_m + (1 - w_{m+1}) g_{m+1},   dc_m = w_m g_m,   dw_m = <g_m, c_m - z_{m-1}>,   dconfidence_t = <du_t, z_m>.
//
// Work is cut into pieces: runs of a sequence's tiles whose first reaches back, and whose last is reached from ahead,
// no further than a tile's length (ema.h). Each tile is walked forward for z and dz, then backward for g. Shares of the
// pieces are those of their bytes.
#include <algorithm>
#include <limits>
#include <vector>

#include "../dechunk.h"
#include "../parallel.h"
#include "arena.h"
#include "ema.h"

namespace bytekernels {
namespace {

constexpr int64_t kRowsPerSum = 64;     // rows added up one by one; such sums are then added
constexpr int64_t kRowsPerTile = 1024;  // of the sum over bytes before their sequence's first chunk

template <class E, class U>
class Worker {
 public:
  Worker(const DechunkShape& shape, Rows<const E> chunks, const float* weight, const U* du,
         const DechunkGradients<E>& gradients)
      : shape_(shape),
        chunks_(chunks),
        weight_(weight),
        ema_(weight, shape.width),
        du_(du),
        gradients_(gradients),
        streamed_(worth_streaming(gradients.dchunks, shape.room, shape.width * static_cast<int64_t>(sizeof(E)))),
        stride_(round_up(shape.width, kLanes)),
        arena_((weight ? 2 * kChunksPerTile + 4 : 2) * stride_),
        sum_(arena_.take(stride_)),
        dz_(arena_.take(stride_)),
        carry_(arena_.take(weight ? stride_ : 0)),
        tile_z_(arena_.take(weight ? (kChunksPerTile + 1) * stride_ : 0)),
        tile_dz_(arena_.take(weight ? kChunksPerTile * stride_ : 0)) {}

  // Chunks without weights, whose z are their own rows.
  void hold(Range chunks) {
    for (int64_t m = chunks.begin; m < chunks.end; ++m) {
      E* const to = gradients_.dchunks + m * shape_.width;
      sum_rows(m, chunks_[m], dz_);
      across(shape_.width, streamed_, [&](int64_t i, auto part) { part.store(to + i, part.load(dz_ + i)); });
    }
  }

  // The pieces that start among these chunks.
  void average(Range chunks) {
    for (int64_t m = chunks.begin; m < chunks.end;) {
      const Range sequence = shape_.sequence(m);
      int64_t begin = Ema::tile_of(sequence, m + kChunksPerTile - 1);
      while (begin < std::min(sequence.end, chunks.end)) {
        int64_t end = begin + kChunksPerTile;
        while (end < sequence.end && !separate(sequence, end)) end += kChunksPerTile;
        if (separate(sequence, begin)) average_piece(sequence, {begin, std::min(end, sequence.end)});
        begin = end;
      }
      m = sequence.end;
    }
  }

 private:
  float* z_after(int64_t tile, int64_t m) const { return tile_z_ + (m - tile + 1) * stride_; }
  float* dz_of(int64_t tile, int64_t m) const { return tile_dz_ + (m - tile) * stride_; }

  // Past the last chunk that adds to g_{m-1} for m, the first chunk of a tile; -1 if it is more than a tile away.
  int64_t reached_from(Range sequence, int64_t m) const {
    float factor = 1;
    for (int64_t j = m; j < std::min(sequence.end, m + kChunksPerTile); ++j) {
      factor *= 1 - weight_[j];
      if (std::abs(factor) < kNegligible) return j;
    }
    return sequence.end - m <= kChunksPerTile ? sequence.end : -1;
  }

  // Whether a piece starts at chunk m, the first of a tile.
  bool separate(Range sequence, int64_t m) const {
    return m == sequence.begin || (ema_.reaching(sequence, m) >= 0 && reached_from(sequence, m) >= 0);
  }

  void average_piece(Range sequence, Range piece) {
    std::fill_n(carry_, stride_, 0.0f);
    if (piece.end < sequence.end) carry_back(sequence, piece.end);

    const int64_t last = Ema::tile_of(piece, piece.end - 1);
    std::vector<float> starts((last - piece.begin) / kChunksPerTile * stride_ + stride_);  // z before each tile
    float* start = starts.data();
    if (piece.begin > sequence.begin) ema_.before_tile(chunks_, sequence, piece.begin, start);
    for (int64_t tile = piece.begin; tile < last; tile += kChunksPerTile, start += stride_) {
      float* const z = start + stride_;
      for (int64_t m = tile; m < tile + kChunksPerTile; ++m) {
        ema_.step(chunks_, sequence, m, m == tile ? start : z, z);
      }
    }
    for (int64_t tile = last; tile >= piece.begin; tile -= kChunksPerTile, start -= stride_) {
      std::copy_n(start, stride_, tile_z_);
      average_tile(sequence, {tile, std::min(tile + kChunksPerTile, piece.end)});
    }
  }

  // carry_ = (1 - w_m) g_m for m, the first chunk after a piece.
  void carry_back(Range sequence, int64_t m) {
    float factor = 1;
    const int64_t end = reached_from(sequence, m);
    for (; m < end; ++m) {
      factor *= 1 - weight_[m];
      sum_rows<float>(m, nullptr, dz_);
      for (int64_t i = 0; i < stride_; i += kLanes) store(carry_ + i, load(carry_ + i) + factor * load(dz_ + i));
    }
  }

  // Given z before the tile in tile_z_ and (1 - w) g of the chunk after it in carry_, leaves that of its first there.
  void average_tile(Range sequence, Range tile) {
    for (int64_t m = tile.begin; m < tile.end; ++m) {
      float* const z = z_after(tile.begin, m);
      ema_.step(chunks_, sequence, m, z - stride_, z);
      sum_rows(m, z, dz_of(tile.begin, m));
    }
    for (int64_t m = tile.end - 1; m >= tile.begin; --m) {
      const bool first = m == sequence.begin;
      const float w = first ? 1 : weight_[m];
      const float *const dz = dz_of(tile.begin, m), *const before = z_after(tile.begin, m - 1);
      const E* const c = chunks_[m];
      E* const to = gradients_.dchunks + m * shape_.width;
      Vec products{};
      across(shape_.width, streamed_, [&](int64_t i, auto part) {
        const Vec g = load(dz + i) + load(carry_ + i);
        store(carry_ + i, g - w * g);
        products += g * (part.load(c + i) - part.load(before + i));
        part.store(to + i, w * g);
      });
      gradients_.dweight[m] = first ? 0 : sum_of_lanes(products);
    }
  }

  // dz [width] = the sum of du over chunk m's bytes; the dconfidence of these too, where z is not null.
  template <class Z>
  void sum_rows(int64_t m, const Z* z, float* dz) {
    const int64_t first = shape_.index[m];
    int64_t end = first;
    while (end < shape_.rows && shape_.chunk_of[end] == m) ++end;
    std::fill_n(dz, stride_, 0.0f);
    for (int64_t begin = first; begin < end; begin += kRowsPerSum) {
      float* const sum = begin == first ? dz : sum_;
      if (sum == sum_) std::fill_n(sum_, stride_, 0.0f);
      for (int64_t t = begin; t < std::min(begin + kRowsPerSum, end); ++t) add_row(t, z, sum);
      if (sum == sum_) {
        for (int64_t i = 0; i < stride_; i += kLanes) store(dz + i, load(dz + i) + load(sum_ + i));
      }
    }
  }

  template <class Z>
  void add_row(int64_t t, const Z* z, float* sum) {
    const U* const row = du_ + t * shape_.width;
    if (!z || !gradients_.dconfidence) {
      across(shape_.width, false, [&](int64_t i, auto part) { store(sum + i, load(sum + i) + part.load(row + i)); });
      return;
    }
    Vec products{};
    across(shape_.width, false, [&](int64_t i, auto part) {
      const Vec value = part.load(row + i);
      store(sum + i, load(sum + i) + value);
      products += value * part.load(z + i);
    });
    gradients_.dconfidence[t] = sum_of_lanes(products);
  }

  const DechunkShape& shape_;
  Rows<const E> chunks_;
  const float* weight_;
  Ema ema_;
  const U* du_;
  DechunkGradients<E> gradients_;
  bool streamed_;
  int64_t stride_;
  Arena arena_;
  float* sum_;
  float* dz_;
  float* carry_;
  float* tile_z_;   // [1 + kChunksPerTile, stride]: z before the tile, and its chunks'
  float* tile_dz_;  // [kChunksPerTile, stride]
};

// dnull, and dconfidence of the bytes that no chunk has a row for: before the first, or of a lost one.
template <class U>
void leave_out(const DechunkShape& shape, const float* null, const U* du, float* dnull, float* dconfidence,
               int threads) {
  const int64_t width = shape.width, held = shape.held(), tiles = (shape.rows + kRowsPerTile - 1) / kRowsPerTile;
  const int64_t stride = round_up(width, kLanes);
  std::vector<float> sums(dnull ? tiles * stride : 0);
  parallel_for(tiles, 1, threads, [&](Range range) {
    for (int64_t t = range.begin * kRowsPerTile; t < std::min(range.end * kRowsPerTile, shape.rows); ++t) {
      const int64_t m = shape.chunk_of[t];
      if (m >= 0 && m < held) continue;
      if (dconfidence) dconfidence[t] = m < 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
      if (m >= 0 || !null) continue;
      const U* const row = du + t * width;
      float* const sum = dnull ? sums.data() + t / kRowsPerTile * stride : nullptr;
      Vec products{};
      across(width, false, [&](int64_t i, auto part) {
        const Vec value = part.load(row + i);
        products += value * part.load(null + i);
        if (sum) part.store(sum + i, part.load(sum + i) + value);
      });
      if (dconfidence) dconfidence[t] = sum_of_lanes(products);
    }
  });
  if (!dnull) return;
  std::vector<double> total(stride);
  for (size_t i = 0; i < sums.size(); ++i) total[i % stride] += sums[i];
  std::copy_n(total.begin(), width, dnull);
}

}  // namespace

template <class E, class U>
void dechunk_backward(const DechunkShape& shape, Rows<const E> chunks, const float* weight, const float* null,
                      const U* du, const DechunkGradients<E>& gradients, int threads) {
  const int64_t width = shape.width, held = shape.held();
  // The chunks before the first that starts at or after a row.
  auto chunks_before = [&](int64_t row) {
    return std::lower_bound(shape.index, shape.index + held, row) - shape.index;
  };
  parallel_for(shape.rows, grain_of(width * static_cast<int64_t>(sizeof(U))), threads, [&](Range rows) {
    Worker<E, U> worker(shape, chunks, weight, du, gradients);
    const Range share{chunks_before(rows.begin), chunks_before(rows.end)};
    if (weight) {
      worker.average(share);
    } else {
      worker.hold(share);
    }
    end_stream();
  });
  std::fill(gradients.dchunks + held * width, gradients.dchunks + shape.room * width, E{});
  if (weight) std::fill(gradients.dweight + held, gradients.dweight + shape.room, 0.0f);
  if (gradients.dnull || gradients.dconfidence) {
    leave_out(shape, null, du, gradients.dnull, gradients.dconfidence, threads);
  }
}

template void dechunk_backward(const DechunkShape&, Rows<const float>, const float*, const float*, const float*,
                               const DechunkGradients<float>&, int);
template void dechunk_backward(const DechunkShape&, Rows<const bf16>, const float*, const float*, const float*,
                               const DechunkGradients<bf16>&, int);
template void dechunk_backward(const DechunkShape&, Rows<const bf16>, const float*, const float*, const bf16*,
                               const DechunkGradients<bf16>&, int);

}  // namespace bytekernels
