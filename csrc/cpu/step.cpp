// The step in three passes: B and C of each (sequence, group); each (sequence, head), whose state is read and written
// once; the gated norm of each sequence's row, in place. What a pass computes depends on no other sequence or thread,
// and no pass touches a sequence that is not active.
#include "step.h"

#include <algorithm>
#include <vector>

#include "../conv.h"
#include "../norm.h"
#include "../parallel.h"
#include "arena.h"
#include "elements.h"

namespace bytekernels {
namespace {

constexpr int kStateRows = 4;  // of a state, that share the loads of B and C

// The value that a vector has once it has been an E.
template <class E>
inline Vec rounded(Vec value) {
  E elements[kLanes];
  store_elements(elements, value);
  return load_elements(elements);
}

template <int K, class E>
class Step {
 public:
  Step(const StepShape& shape, const StepInputs<E>& inputs, const StepState& state, E* out)
      : shape_(shape),
        inputs_(inputs),
        state_(state),
        out_(out),
        padded_state_(round_up(shape.d_state, kLanes)),
        padded_head_(round_up(shape.headdim, kLanes)),
        arena_(2 * shape.sequences * shape.groups * padded_state_),
        shared_(arena_.take(2 * shape.sequences * shape.groups * padded_state_)) {
    active_.reserve(shape.sequences);
    for (int64_t s = 0; s < shape.sequences; ++s) {
      if (is_active(s)) active_.push_back(s);
    }
  }

  void run(int threads) {
    const int64_t n = shape_.d_state, ring_bytes = 2 * K * sizeof(float);
    const int64_t count = static_cast<int64_t>(active_.size());
    parallel_for(count * shape_.groups, grain_of(2 * n * ring_bytes), threads, [&](Range range) {
      for (int64_t i = range.begin; i < range.end; ++i) fill_shared(active_[i / shape_.groups], i % shape_.groups);
    });
    const int64_t head_bytes = shape_.headdim * (2 * n * static_cast<int64_t>(sizeof(float)) + ring_bytes);
    parallel_for(count * shape_.heads, grain_of(head_bytes), threads, [&](Range range) {
      Arena lines(3 * padded_head_);
      float *const x = lines.take(padded_head_), *const inflow = lines.take(padded_head_);
      float* const y = lines.take(padded_head_);
      for (int64_t i = range.begin; i < range.end; ++i) head(active_[i / shape_.heads], i % shape_.heads, x, inflow, y);
    });
    normalise(threads);
  }

 private:
  bool is_active(int64_t sequence) const { return !inputs_.active || inputs_.active[sequence]; }

  // The gated norm of each run of active rows; zeros elsewhere.
  void normalise(int threads) const {
    const int64_t inner = shape_.inner();
    for (int64_t s = 0, end; s < shape_.sequences; s = end) {
      const bool active = is_active(s);
      end = s + 1;
      while (end < shape_.sequences && is_active(end) == active) ++end;
      E* const rows = out_ + s * inner;
      if (active) {
        const NormShape norm{end - s, inner, inner / shape_.groups, inputs_.eps};
        const Rows<const E> z{inputs_.zxbcdt[s], inputs_.zxbcdt.stride};
        gated_rms_norm<E>(norm, {rows, inner}, z, inputs_.norm_weight, rows, threads);
      } else {
        std::fill_n(rows, (end - s) * inner, E{});
      }
    }
  }

  // B of a group, and padded_state_ floats later C.
  float* shared(int64_t sequence, int64_t group) const {
    return shared_ + 2 * (sequence * shape_.groups + group) * padded_state_;
  }

  void fill_shared(int64_t sequence, int64_t group) {
    const int64_t n = shape_.d_state, first = shape_.inner() + group * n;
    const int slot = slot_of(state_.position[sequence * shape_.heads + group * (shape_.heads / shape_.groups)]);
    float* const to = shared(sequence, group);
    convolve(sequence, first, n, slot, to);
    convolve(sequence, first + shape_.groups * n, n, slot, to + padded_state_);
  }

  // S = exp(Delta A) S + Delta x (x) B and y = S C + D x, with lines for x, Delta x and y.
  void head(int64_t sequence, int64_t head, float* x, float* inflow, float* y) {
    const int64_t i = sequence * shape_.heads + head, p = shape_.headdim, n = shape_.d_state;
    const int slot = slot_of(state_.position[i]);
    convolve(sequence, head * p, p, slot, x);
    state_.position[i] = (slot + 1) % K;

    const float dt = to_float(inputs_.zxbcdt[sequence][shape_.inner() + shape_.channels() + head]);
    const Vec delta = time_step(dt + (inputs_.dt_bias ? inputs_.dt_bias[head] : 0.0f));
    const Vec decay = exp_of_nonpositive(delta * inputs_.A[head]);
    for (int64_t j = 0; j < padded_head_; j += kLanes) store(inflow + j, delta * load(x + j));

    float* const state = state_.ssm + i * p * n;
    const float* const B = shared(sequence, head / (shape_.heads / shape_.groups));
    int64_t row = 0;
    for (; row + kStateRows <= p; row += kStateRows)
      update<kStateRows>(state + row * n, decay, inflow + row, B, y + row);
    for (; row < p; ++row) update<1>(state + row * n, decay, inflow + row, B, y + row);

    const float skip = inputs_.D ? inputs_.D[head] : 0.0f;
    across(p, false, [&](int64_t j, auto part) { part.store(out_ + i * p + j, load(y + j) + skip * load(x + j)); });
  }

  // R rows of a state, and their products with C.
  template <int R>
  void update(float* state, Vec decay, const float* inflow, const float* B, float* y) const {
    const int64_t n = shape_.d_state;
    const float* const C = B + padded_state_;
    Vec sums[R] = {};
    across(n, false, [&](int64_t i, auto part) {
      const Vec in = load(B + i), out = load(C + i);
      for (int r = 0; r < R; ++r) {
        const Vec value = decay * part.load(state + r * n + i) + inflow[r] * in;
        part.store(state + r * n + i, value);
        sums[r] += value * out;
      }
    });
    for (int r = 0; r < R; ++r) y[r] = sum_of_lanes(sums[r]);
  }

  // silu(bias + sum_k weight_k row_k) of `count` channels from `first` on, rounded to E, zeros up to a whole vector.
  // The new row goes into the ring's slot.
  void convolve(int64_t sequence, int64_t first, int64_t count, int slot, float* to) {
    const E* const row = inputs_.zxbcdt[sequence] + shape_.inner() + first;
    float* const ring = state_.conv + (sequence * shape_.channels() + first) * K;
    for (int64_t c = 0; c < count; ++c) ring[c * K + slot] = to_float(row[c]);
    for (int64_t c = 0; c < count; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(count - c, kLanes));
      Taps rows, weights;
      rows.read(ring + c * K, lanes);
      weights.read(inputs_.conv_weight + (first + c) * K, lanes);
      alignas(kVectorBytes) float bias[kLanes] = {};
      if (inputs_.conv_bias) std::copy_n(inputs_.conv_bias + first + c, lanes, bias);
      Vec sum = load(bias);
      for (int k = 0; k < K; ++k) sum += load(weights.line[k]) * load(rows.line[(slot + 1 + k) % K]);  // oldest first
      store(to + c, rounded<E>(sum * sigmoid(sum)));
    }
  }

  // K values of up to kLanes channels, turned: a line for each of the K.
  struct Taps {
    alignas(kVectorBytes) float line[K][kLanes];

    void read(const float* from, int lanes) {
      if (lanes < kLanes) std::fill_n(line[0], K * kLanes, 0.0f);
      for (int c = 0; c < lanes; ++c) {
        for (int k = 0; k < K; ++k) line[k][c] = from[c * K + k];
      }
    }
  };

  // clamp(softplus(dt)) in every lane.
  Vec time_step(float dt) const {
    const Vec step = softplus(broadcast(dt));
    const Vec clamped = minimum(maximum(step, broadcast(inputs_.dt_min)), broadcast(inputs_.dt_max));
    return dt == dt ? clamped : broadcast(dt);  // a comparison with NaN is false: it must not be lost
  }

  static int slot_of(int32_t position) { return (position % K + K) % K; }

  const StepShape& shape_;
  const StepInputs<E>& inputs_;
  const StepState& state_;
  E* out_;
  int64_t padded_state_;
  int64_t padded_head_;
  Arena arena_;
  float* shared_;                // [S, G, 2, N], B and C
  std::vector<int64_t> active_;  // the sequences that take the step
};

}  // namespace

template <class E>
void mixer_step(const StepShape& shape, const StepInputs<E>& inputs, const StepState& state, E* out, int threads) {
  switch (shape.taps) {
    case 2:
      return Step<2, E>(shape, inputs, state, out).run(threads);
    case 3:
      return Step<3, E>(shape, inputs, state, out).run(threads);
    case 4:
      return Step<4, E>(shape, inputs, state, out).run(threads);
  }
}

template void mixer_step(const StepShape&, const StepInputs<float>&, const StepState&, float*, int);
template void mixer_step(const StepShape&, const StepInputs<bf16>&, const StepState&, bf16*, int);

}  // namespace bytekernels
