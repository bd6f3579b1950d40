// The convolution in tiles of rows and channels that depend on the shape alone. A tile walks down each sequence's rows
// with those that the taps reach as floats in a ring; rows before the tile, and in backward after it, are read again.
//
// With p_t = bias + sum_k weight_k x_{t-K+1+k} and dp_t = dy_t act'(p_t):
//   dx_t = sum_j weight_{K-1-j} dp_{t+j},   dweight_k = sum_t dp_t x_{t-K+1+k},   dbias = sum_t dp_t.
// Rows -(K-1) to -1 of a sequence are its initial state, and its last K-1 rows its final state.
#include "conv.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "../ragged.h"
#include "arena.h"

namespace bytekernels {
namespace {

constexpr int64_t kRowsPerTile = 256;
constexpr int64_t kChannelsPerTile = 512;

struct Tile {
  Range rows;
  Range channels;
  int64_t width;  // channels, padded to whole vectors
};

// The tiles of [total, channels]; those of the same rows are neighbours.
class Tiling {
 public:
  Tiling(int64_t total, int64_t channels)
      : total_(total),
        channels_(channels),
        across_((channels + kChannelsPerTile - 1) / kChannelsPerTile),
        down_((total + kRowsPerTile - 1) / kRowsPerTile) {}

  int64_t down() const { return down_; }
  int64_t row_of(int64_t index) const { return index / across_; }

  // Calls body(index, tile) for each, in parallel.
  template <class Body>
  void run(int threads, Body&& body) const {
    parallel_for(down_ * across_, 1, threads, [&](Range range) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t row = i / across_ * kRowsPerTile, channel = i % across_ * kChannelsPerTile;
        const Range channels{channel, std::min(channel + kChannelsPerTile, channels_)};
        body(i, Tile{{row, std::min(row + kRowsPerTile, total_)}, channels, round_up(channels.size(), kLanes)});
      }
    });
  }

 private:
  int64_t total_, channels_, across_, down_;
};

// The rows of one sequence that lie in a tile, and the whole of it.
struct Piece {
  int64_t sequence;
  Range rows;
  Range whole;
};

template <class Body>
void for_each_piece(const ConvShape& shape, Range rows, Body&& body) {
  for (int64_t s = sequence_of(shape.cu, shape.sequences, rows.begin); s < shape.sequences; ++s) {
    const Range whole{shape.cu[s], shape.cu[s + 1]};
    if (whole.begin >= rows.end) break;
    const Range inside{std::max(whole.begin, rows.begin), std::min(whole.end, rows.end)};
    if (inside.size() > 0) body(Piece{s, inside, whole});
  }
}

// One tile's weights, [K, width] and the bias [width], and its walks.
template <int K, class E>
class Walker {
 public:
  Walker(const ConvShape& shape, const ConvInputs<E>& inputs, const Tile& tile)
      : shape_(shape),
        inputs_(inputs),
        tile_(tile),
        arena_((4 * K + 5) * tile.width),
        weight_(arena_.take(K * tile.width)),
        bias_(arena_.take(tile.width)),
        x_(arena_.take(K * tile.width)),
        dp_(arena_.take(K * tile.width)),
        line_(arena_.take(tile.width)),
        dweight_(arena_.take(K * tile.width)),
        dbias_(arena_.take(tile.width)) {
    std::fill_n(weight_, (K + 1) * tile.width, 0.0f);
    for (int64_t c = 0; c < tile.channels.size(); ++c) {
      for (int k = 0; k < K; ++k) weight_[k * tile.width + c] = inputs.weight[(tile.channels.begin + c) * K + k];
      if (inputs.bias) bias_[c] = inputs.bias[tile.channels.begin + c];
    }
  }

  void forward(const Piece& piece, E* y) {
    start(piece);
    for (int64_t row = piece.rows.begin; row < piece.rows.end; ++row) {
      const Lines x = next_row(row);
      for (int64_t c = 0; c < tile_.width; c += kLanes) {
        const Vec p = convolve(x, c);
        store(line_ + c, inputs_.silu ? p * sigmoid(p) : p);
      }
      store_row(line_, tile_.channels.size(), y + row * shape_.channels + tile_.channels.begin);
    }
  }

  // The sums over the pieces that backward() has walked since they were cleared.
  void clear_sums() { std::fill_n(dweight_, (K + 1) * tile_.width, 0.0f); }
  const float* dweight(int k) const { return dweight_ + k * tile_.width; }
  const float* dbias() const { return dbias_; }

  void backward(const Piece& piece, const E* dy, const E* dfinal_states, const ConvGradients<E>& gradients) {
    // dx of a row needs dp of the K-1 after it: those beyond the tile are computed here too.
    const int64_t stop = std::min(piece.rows.end + K - 1, piece.whole.end);
    start(piece);
    for (int64_t row = piece.rows.begin; row < stop; ++row) {
      const Lines x = next_row(row);
      load_row(dy + row * shape_.channels + tile_.channels.begin, tile_.channels.size(), tile_.width, line_);
      float* const dp = line(dp_, row);
      for (int64_t c = 0; c < tile_.width; c += kLanes) {
        const Vec p = convolve(x, c), share = sigmoid(p), dline = load(line_ + c);
        const Vec value = inputs_.silu ? dline * share * (1.0f + p * (1.0f - share)) : dline;
        store(dp + c, value);
        if (row >= piece.rows.end) continue;
        for (int k = 0; k < K; ++k) {
          float* const sum = dweight_ + k * tile_.width + c;
          store(sum, load(sum) + value * load(x.row[k] + c));
        }
        store(dbias_ + c, load(dbias_ + c) + value);
      }
      const int64_t done = row - (K - 1);
      if (done >= piece.rows.begin) store_dx(piece, done, stop, dfinal_states, gradients.dx);
      const bool starts = piece.rows.begin == piece.whole.begin && gradients.dinitial_states;
      if (starts && row == std::min(piece.whole.begin + K - 2, piece.whole.end - 1)) {
        add_dinitial(piece, stop, gradients.dinitial_states);
      }
    }
    for (int64_t row = std::max(stop - (K - 1), piece.rows.begin); row < piece.rows.end; ++row) {
      store_dx(piece, row, stop, dfinal_states, gradients.dx);
    }
  }

 private:
  struct Lines {
    const float* row[K];  // the rows that the taps reach, oldest first
  };

  // Where a ring holds a row; rows from -(K-1) on.
  float* line(float* ring, int64_t row) const { return ring + (row + K) % K * tile_.width; }

  // Fills the ring with the K-1 rows before the piece.
  void start(const Piece& piece) {
    const Range channels = tile_.channels;
    for (int64_t row = piece.rows.begin - (K - 1); row < piece.rows.begin; ++row) {
      float* const to = line(x_, row);
      const int64_t place = row - piece.whole.begin + K - 1;  // in the initial state, where it is before the sequence
      if (place >= K - 1) {
        load_row(inputs_.x[row] + channels.begin, channels.size(), tile_.width, to);
        continue;
      }
      std::fill_n(to, tile_.width, 0.0f);
      if (!inputs_.initial_states) continue;
      const E* const states = inputs_.initial_states + state_of(piece);
      for (int64_t c = 0; c < channels.size(); ++c) to[c] = to_float(states[c * (K - 1) + place]);
    }
  }

  int64_t state_of(const Piece& piece) const {
    return (piece.sequence * shape_.channels + tile_.channels.begin) * (K - 1);
  }

  // Reads the row into the ring.
  Lines next_row(int64_t row) {
    load_row(inputs_.x[row] + tile_.channels.begin, tile_.channels.size(), tile_.width, line(x_, row));
    Lines lines;
    for (int k = 0; k < K; ++k) lines.row[k] = line(x_, row - (K - 1) + k);
    return lines;
  }

  Vec convolve(const Lines& x, int64_t c) const {
    Vec sum = load(bias_ + c);
    for (int k = 0; k < K; ++k) sum += load(weight_ + k * tile_.width + c) * load(x.row[k] + c);
    return sum;
  }

  // line_ = sum_j weight_{K-1-j} dp_{row+j} over rows from `first` to before `stop`.
  void gather(int64_t row, int64_t first, int64_t stop) {
    std::fill_n(line_, tile_.width, 0.0f);
    for (int j = 0; j < K; ++j) {
      if (row + j < first || row + j >= stop) continue;
      const float *dp = line(dp_, row + j), *weight = weight_ + (K - 1 - j) * tile_.width;
      for (int64_t c = 0; c < tile_.width; c += kLanes)
        store(line_ + c, load(line_ + c) + load(weight + c) * load(dp + c));
    }
  }

  void store_dx(const Piece& piece, int64_t row, int64_t stop, const E* dfinal_states, E* dx) {
    gather(row, row, stop);
    const int64_t place = row - (piece.whole.end - (K - 1));  // in the final state
    if (place >= 0) {
      const E* const states = dfinal_states + state_of(piece);
      for (int64_t c = 0; c < tile_.channels.size(); ++c) line_[c] += to_float(states[c * (K - 1) + place]);
    }
    store_row(line_, tile_.channels.size(), dx + row * shape_.channels + tile_.channels.begin);
  }

  // The ring holds dp of the sequence's first rows, up to K-1 of them.
  void add_dinitial(const Piece& piece, int64_t stop, float* dinitial_states) {
    float* const states = dinitial_states + state_of(piece);
    const int64_t first = piece.whole.begin;
    for (int64_t place = 0; place < K - 1; ++place) {
      gather(first - (K - 1) + place, first, std::min(stop, first + K - 1));
      for (int64_t c = 0; c < tile_.channels.size(); ++c) states[c * (K - 1) + place] += line_[c];
    }
  }

  const ConvShape& shape_;
  const ConvInputs<E>& inputs_;
  Tile tile_;
  Arena arena_;
  float* weight_;
  float* bias_;
  float* x_;   // ring of rows
  float* dp_;  // ring of rows
  float* line_;
  float* dweight_;
  float* dbias_;
};

// Calls body(s, c, i, row) for each element of the states [S, C, K-1], with the row of sequence s, counted from the
// packed batch's first, that place i of its final state holds: it may lie before the sequence.
template <class Body>
void for_each_state(const ConvShape& shape, int threads, Body&& body) {
  const int history = shape.taps - 1;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(shape.channels, 1));
  parallel_for(shape.sequences, grain, threads, [&](Range range) {
    for (int64_t s = range.begin; s < range.end; ++s) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int i = 0; i < history; ++i) body(s, c, i, shape.cu[s + 1] - history + i);
      }
    }
  });
}

template <int K, class E>
void forward(const ConvShape& shape, const ConvInputs<E>& inputs, E* y, E* final_states, int threads) {
  Tiling(shape.cu[shape.sequences], shape.channels).run(threads, [&](int64_t, const Tile& tile) {
    Walker<K, E> walker(shape, inputs, tile);
    for_each_piece(shape, tile.rows, [&](const Piece& piece) { walker.forward(piece, y); });
  });
  for_each_state(shape, threads, [&](int64_t s, int64_t c, int i, int64_t row) {
    const int64_t state = (s * shape.channels + c) * (K - 1), before = row - shape.cu[s];
    E value{};
    if (before >= 0) {
      value = inputs.x[row][c];
    } else if (inputs.initial_states) {
      value = inputs.initial_states[state + K - 1 + before];
    }
    final_states[state + i] = value;
  });
}

template <int K, class E>
void backward(const ConvShape& shape, const ConvInputs<E>& inputs, const E* dy, const E* dfinal_states,
              const ConvGradients<E>& gradients, int threads) {
  if (gradients.dinitial_states) {  // what an initial state passes on to the final one of a sequence below K-1 rows
    std::fill_n(gradients.dinitial_states, shape.sequences * shape.channels * (K - 1), 0.0f);
    for_each_state(shape, threads, [&](int64_t s, int64_t c, int i, int64_t row) {
      const int64_t state = (s * shape.channels + c) * (K - 1), before = row - shape.cu[s];
      if (before < 0) gradients.dinitial_states[state + K - 1 + before] = to_float(dfinal_states[state + i]);
    });
  }
  const Tiling tiling(shape.cu[shape.sequences], shape.channels);
  std::vector<float> sums(tiling.down() * (K + 1) * shape.channels);  // [tiles down, K + 1, C]
  tiling.run(threads, [&](int64_t index, const Tile& tile) {
    Walker<K, E> walker(shape, inputs, tile);
    walker.clear_sums();
    for_each_piece(shape, tile.rows, [&](const Piece& piece) { walker.backward(piece, dy, dfinal_states, gradients); });
    float* const own = sums.data() + tiling.row_of(index) * (K + 1) * shape.channels + tile.channels.begin;
    for (int k = 0; k < K; ++k) std::copy_n(walker.dweight(k), tile.channels.size(), own + k * shape.channels);
    std::copy_n(walker.dbias(), tile.channels.size(), own + K * shape.channels);
  });
  parallel_for(shape.channels, 64, threads, [&](Range range) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      double total[K + 1] = {};
      for (int64_t i = 0; i < tiling.down(); ++i) {
        for (int k = 0; k <= K; ++k) total[k] += sums[(i * (K + 1) + k) * shape.channels + c];
      }
      for (int k = 0; k < K; ++k) gradients.dweight[c * K + k] = static_cast<float>(total[k]);
      if (gradients.dbias) gradients.dbias[c] = static_cast<float>(total[K]);
    }
  });
}

}  // namespace

template <class E>
void conv_forward(const ConvShape& shape, const ConvInputs<E>& inputs, E* y, E* final_states, int threads) {
  switch (shape.taps) {
    case 2:
      return forward<2>(shape, inputs, y, final_states, threads);
    case 3:
      return forward<3>(shape, inputs, y, final_states, threads);
    case 4:
      return forward<4>(shape, inputs, y, final_states, threads);
  }
}

template <class E>
void conv_backward(const ConvShape& shape, const ConvInputs<E>& inputs, const E* dy, const E* dfinal_states,
                   const ConvGradients<E>& gradients, int threads) {
  switch (shape.taps) {
    case 2:
      return backward<2>(shape, inputs, dy, dfinal_states, gradients, threads);
    case 3:
      return backward<3>(shape, inputs, dy, dfinal_states, gradients, threads);
    case 4:
      return backward<4>(shape, inputs, dy, dfinal_states, gradients, threads);
  }
}

template void conv_forward(const ConvShape&, const ConvInputs<float>&, float*, float*, int);
template void conv_forward(const ConvShape&, const ConvInputs<bf16>&, bf16*, bf16*, int);
template void conv_backward(const ConvShape&, const ConvInputs<float>&, const float*, const float*,
                            const ConvGradients<float>&, int);
template void conv_backward(const ConvShape&, const ConvInputs<bf16>&, const bf16*, const bf16*,
                            const ConvGradients<bf16>&, int);

}  // namespace bytekernels
