// The norms, a group of a row at a time in float32. With h what is normalised, r = 1 / sqrt(mean(h^2) + eps):
//   y = h r weight,   dh = r (g - h r^2 mean(g h)) with g = dy weight,   dweight = sum over rows of dy h r.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../parallel.h"
#include "arena.h"

namespace bytekernels {
namespace {

constexpr int64_t kRowsPerTile = 128;
constexpr int kLines = 4;

int64_t tiles_of(const NormShape& shape) { return (shape.rows + kRowsPerTile - 1) / kRowsPerTile; }

// One thread's weights and their gradients, by groups that are padded to whole vectors with zeros, and its lines:
// places for a group's elements.
class Worker {
 public:
  Worker(const NormShape& shape, const float* weight)
      : size(shape.group_size),
        padded(round_up(size, kLanes)),
        groups(shape.width / size),
        inverse_size_(1.0f / static_cast<float>(size)),
        eps_(shape.eps),
        arena_((2 * groups + kLines) * padded),
        weight_(arena_.take(groups * padded)),
        dweight_(arena_.take(groups * padded)),
        lines_(arena_.take(kLines * padded)) {
    for (int64_t g = 0; g < groups; ++g) read(weight + g * size, weight_ + g * padded);
    std::fill_n(dweight_, groups * padded, 0.0f);
  }

  const int64_t size;
  const int64_t padded;
  const int64_t groups;

  float* line(int i) const { return lines_ + i * padded; }

  template <class E>
  void read(const E* from, float* line) const {
    load_row(from, size, padded, line);
  }

  // y, which h may be.
  void forward(int64_t group, const float* h, float* y) const {
    const float* const weight = weight_ + group * padded;
    const float r = scale(h);
    for (int64_t i = 0; i < padded; i += kLanes) store(y + i, load(h + i) * r * load(weight + i));
  }

  // dh, which dy may be. Adds to dweight.
  void backward(int64_t group, const float* h, const float* dy, float* dh) const {
    const float* const weight = weight_ + group * padded;
    float* const dweight = dweight_ + group * padded;
    const float r = scale(h);
    Vec products{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec product = load(dy + i) * load(h + i);
      products += product * load(weight + i);
      store(dweight + i, load(dweight + i) + product * r);
    }
    const float along = r * r * inverse_size_ * sum_of_lanes(products);
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(dh + i, r * (load(dy + i) * load(weight + i) - load(h + i) * along));
    }
  }

  // Writes dweight [width] and clears it.
  void take_dweight(float* to) {
    for (int64_t g = 0; g < groups; ++g) store_row(dweight_ + g * padded, size, to + g * size);
    std::fill_n(dweight_, groups * padded, 0.0f);
  }

 private:
  float scale(const float* h) const { return 1.0f / std::sqrt(dot(h, h, padded) * inverse_size_ + eps_); }

  float inverse_size_;
  float eps_;
  Arena arena_;
  float* weight_;
  float* dweight_;
  float* lines_;
};

// Calls body(worker, row, group, offset of the group in [rows, width]) for all, in tiles of rows, in parallel. Then
// dweight, unless null, is the sum of the tiles' in their order.
template <class Body>
void for_each_group(const NormShape& shape, const float* weight, float* dweight, int threads, Body&& body) {
  std::vector<float> sums(dweight ? tiles_of(shape) * shape.width : 0);  // [tiles, width]
  parallel_for(tiles_of(shape), 1, threads, [&](Range range) {
    Worker worker(shape, weight);
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      const int64_t end = std::min((tile + 1) * kRowsPerTile, shape.rows);
      for (int64_t row = tile * kRowsPerTile; row < end; ++row) {
        for (int64_t g = 0; g < worker.groups; ++g) body(worker, row, g, row * shape.width + g * worker.size);
      }
      if (dweight) worker.take_dweight(sums.data() + tile * shape.width);
    }
  });
  if (!dweight) return;
  std::vector<double> total(shape.width);
  for (size_t i = 0; i < sums.size(); ++i) total[i % shape.width] += sums[i];
  std::copy(total.begin(), total.end(), dweight);
}

// line = x + residual, rounded to R as the sum that is kept.
template <class E, class R>
void read_sum(const Worker& worker, Rows<const E> x, Rows<const R> residual, int64_t row, int64_t group, float* line) {
  worker.read(x[row] + group * worker.size, line);
  if (!residual.data) return;
  const R* const other = residual[row] + group * worker.size;
  for (int64_t i = 0; i < worker.size; ++i) line[i] = to_float(from_float<R>(line[i] + to_float(other[i])));
}

}  // namespace

template <class E, class R>
void rms_norm(const NormShape& shape, Rows<const E> x, Rows<const R> residual, const float* weight, E* y, R* total,
              int threads) {
  for_each_group(shape, weight, nullptr, threads, [&](Worker& worker, int64_t row, int64_t group, int64_t offset) {
    float* const h = worker.line(0);
    read_sum(worker, x, residual, row, group, h);
    if (residual.data) store_row(h, worker.size, total + offset);
    worker.forward(group, h, h);
    store_row(h, worker.size, y + offset);
  });
}

template <class E, class R>
void rms_norm_backward(const NormShape& shape, Rows<const E> x, Rows<const R> residual, const float* weight,
                       const E* dy, const R* dtotal, E* dx, R* dresidual, float* dweight, int threads) {
  for_each_group(shape, weight, dweight, threads, [&](Worker& worker, int64_t row, int64_t group, int64_t offset) {
    float *const h = worker.line(0), *const d = worker.line(1);
    read_sum(worker, x, residual, row, group, h);
    worker.read(dy + offset, d);
    worker.backward(group, h, d, d);
    if (residual.data) {
      for (int64_t i = 0; i < worker.size; ++i) d[i] += to_float(dtotal[offset + i]);
      store_row(d, worker.size, dresidual + offset);
    }
    store_row(d, worker.size, dx + offset);
  });
}

template <class E>
void gated_rms_norm(const NormShape& shape, Rows<const E> y, Rows<const E> z, const float* weight, E* out,
                    int threads) {
  for_each_group(shape, weight, nullptr, threads, [&](Worker& worker, int64_t row, int64_t group, int64_t offset) {
    float *const h = worker.line(0), *const gate = worker.line(1);
    worker.read(y[row] + group * worker.size, h);
    worker.read(z[row] + group * worker.size, gate);
    for (int64_t i = 0; i < worker.padded; i += kLanes) {
      store(h + i, load(h + i) * load(gate + i) * sigmoid(load(gate + i)));
    }
    worker.forward(group, h, h);
    store_row(h, worker.size, out + offset);
  });
}

template <class E>
void gated_rms_norm_backward(const NormShape& shape, Rows<const E> y, Rows<const E> z, const float* weight,
                             const E* dout, E* dy, E* dz, float* dweight, int threads) {
  for_each_group(shape, weight, dweight, threads, [&](Worker& worker, int64_t row, int64_t group, int64_t offset) {
    float *const h = worker.line(0), *const gate = worker.line(1), *const d = worker.line(2);
    float* const slope = worker.line(3);
    worker.read(y[row] + group * worker.size, h);
    worker.read(z[row] + group * worker.size, gate);
    worker.read(dout + offset, d);
    // With s the sigmoid of z, silu'(z) = s + silu(z) (1 - s).
    for (int64_t i = 0; i < worker.padded; i += kLanes) {
      const Vec share = sigmoid(load(gate + i)), silu = load(gate + i) * share;
      store(slope + i, load(h + i) * (share + silu * (1.0f - share)));
      store(h + i, load(h + i) * silu);
      store(gate + i, silu);
    }
    worker.backward(group, h, d, d);
    for (int64_t i = 0; i < worker.padded; i += kLanes) {
      store(gate + i, load(gate + i) * load(d + i));
      store(slope + i, load(slope + i) * load(d + i));
    }
    store_row(gate, worker.size, dy + offset);
    store_row(slope, worker.size, dz + offset);
  });
}

template void rms_norm(const NormShape&, Rows<const float>, Rows<const float>, const float*, float*, float*, int);
template void rms_norm(const NormShape&, Rows<const bf16>, Rows<const float>, const float*, bf16*, float*, int);
template void rms_norm(const NormShape&, Rows<const bf16>, Rows<const bf16>, const float*, bf16*, bf16*, int);
template void rms_norm_backward(const NormShape&, Rows<const float>, Rows<const float>, const float*, const float*,
                                const float*, float*, float*, float*, int);
template void rms_norm_backward(const NormShape&, Rows<const bf16>, Rows<const float>, const float*, const bf16*,
                                const float*, bf16*, float*, float*, int);
template void rms_norm_backward(const NormShape&, Rows<const bf16>, Rows<const bf16>, const float*, const bf16*,
                                const bf16*, bf16*, bf16*, float*, int);
template void gated_rms_norm(const NormShape&, Rows<const float>, Rows<const float>, const float*, float*, int);
template void gated_rms_norm(const NormShape&, Rows<const bf16>, Rows<const bf16>, const float*, bf16*, int);
template void gated_rms_norm_backward(const NormShape&, Rows<const float>, Rows<const float>, const float*,
                                      const float*, float*, float*, float*, int);
template void gated_rms_norm_backward(const NormShape&, Rows<const bf16>, Rows<const bf16>, const float*, const bf16*,
                                      bf16*, bf16*, float*, int);

}  // namespace bytekernels
