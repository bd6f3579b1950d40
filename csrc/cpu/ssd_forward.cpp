// The scan's forward: each task walks its sequence's chunks, with the heads' states in cache as [N, P].
#include "ssd_chunk.h"

namespace bytekernels {
namespace {

template <class E>
class Forward {
 public:
  Forward(const ScanShape& shape, const ScanInputs<E>& inputs, int64_t heads, E* y, float* final_states)
      : shape_(shape),
        inputs_(inputs),
        padded_(shape),
        y_(y),
        final_states_(final_states),
        arena_(GroupChunk::floats(padded_.d_state) + kChunk * (2 * padded_.headdim + padded_.d_state + kChunk) +
               (heads + 1) * padded_.state()),
        group_(arena_.take(GroupChunk::floats(padded_.d_state)), padded_.d_state),
        x_(arena_.take(kChunk * padded_.headdim)),
        out_(arena_.take(kChunk * padded_.headdim)),
        weighted_B_(arena_.take(kChunk * padded_.d_state)),
        mixing_(arena_.take(kChunk * kChunk)),
        turned_(arena_.take(padded_.state())),
        states_(arena_.take(heads * padded_.state())) {}

  void operator()(const Tasks::Task& task) {
    const int64_t begin = shape_.cu[task.sequence], end = shape_.cu[task.sequence + 1];
    const int64_t heads = task.last_head - task.first_head;
    const int64_t first_state = (task.sequence * shape_.heads + task.first_head) * state_size();
    for (int64_t h = 0; h < heads; ++h) {
      const float* initial = inputs_.initial_states;
      load_state(initial ? initial + first_state + h * state_size() : nullptr, shape_, padded_, turned_);
      transpose(turned_, padded_.d_state, state(h), padded_.headdim, padded_.headdim, padded_.d_state);
    }
    for (int64_t row = begin; row < end; row += kChunk) {
      const int64_t q = std::min<int64_t>(kChunk, end - row);
      group_.fill(inputs_, shape_, task.group, row, q, padded_.d_state);
      for (int64_t h = 0; h < heads; ++h) chunk(task.first_head + h, row, q, state(h));
    }
    for (int64_t h = 0; h < heads; ++h) {
      transpose(state(h), padded_.headdim, turned_, padded_.d_state, padded_.d_state, padded_.headdim);
      store_state(turned_, shape_, padded_, final_states_ + first_state + h * state_size());
    }
  }

 private:
  int64_t state_size() const { return shape_.headdim * shape_.d_state; }
  float* state(int64_t h) const { return states_ + h * padded_.state(); }

  // y of rows [row, row + q) and the state after them.
  void chunk(int64_t head, int64_t row, int64_t q, float* state) {
    const int64_t n = padded_.d_state, p = padded_.headdim, tiles = round_up(q, kTileRows);
    steps_.fill(inputs_, head, row, q);
    load_chunk(inputs_.x, row, q, head * shape_.headdim, shape_.headdim, p, x_);

    // out_t = exp(cs_t) S0 C_t + sum_{s<=t} L_ts (C_t . B_s) Delta_s x_s
    multiply(tiles, p, {group_.C, n, 1}, {state, p}, {out_, p}, AllK{n});
    scale_rows(out_, q, p, steps_.from_start);
    steps_.decays(q, mixing_);
    for (int64_t t = 0; t < q; ++t) {
      for (int64_t s = 0; s < kChunk; s += kLanes) {
        const int64_t i = t * kChunk + s;
        store(mixing_ + i, load(mixing_ + i) * load(group_.CB + i) * load(steps_.delta + s));
      }
    }
    multiply_add(tiles, p, {mixing_, kChunk, 1}, {x_, p}, {out_, p}, 1, LowerLeft{q});

    // S1 = exp(cs_q) S0 + sum_s exp(cs_q - cs_s) Delta_s B_s (x) x_s
    for (int64_t s = 0; s < kChunk; s += kLanes) {
      store(weights_ + s, load(steps_.to_end + s) * load(steps_.delta + s));
    }
    scaled_rows(group_.B, q, n, weights_, weighted_B_);
    multiply_add(n, p, {weighted_B_, 1, n}, {x_, p}, {state, p}, steps_.decay, AllK{q});
    finish(head, row, q);
  }

  // Skip, gate and store.
  void finish(int64_t head, int64_t row, int64_t q) {
    const int64_t p = padded_.headdim;
    const float skip = inputs_.D ? inputs_.D[head] : 0.0f;
    for (int64_t t = 0; t < q; ++t) {
      float *out = out_ + t * p, *x = x_ + t * p;
      for (int64_t i = 0; i < p; i += kLanes) store(out + i, load(out + i) + skip * load(x + i));
      if (inputs_.z.data) {
        float* z = x;  // x is not needed any more
        load_row(inputs_.z[row + t] + head * shape_.headdim, shape_.headdim, p, z);
        for (int64_t i = 0; i < p; i += kLanes) store(out + i, load(out + i) * load(z + i) * sigmoid(load(z + i)));
      }
      store_row(out, shape_.headdim, y_ + ((row + t) * shape_.heads + head) * shape_.headdim);
    }
  }

  const ScanShape& shape_;
  const ScanInputs<E>& inputs_;
  PaddedSizes padded_;
  E* y_;
  float* final_states_;
  Arena arena_;
  GroupChunk group_;
  float* x_;           // [Q, P]
  float* out_;         // [Q, P]
  float* weighted_B_;  // [Q, N]
  float* mixing_;      // [Q, Q]
  float* turned_;      // [P, N]
  float* states_;      // [heads, N, P]
  alignas(kVectorBytes) float weights_[kChunk];
  Steps steps_;
};

}  // namespace

template <class E>
void ssd_forward(const ScanShape& shape, const ScanInputs<E>& inputs, E* y, float* final_states, int threads) {
  const Tasks tasks(shape, threads);
  tasks.run([&] { return Forward<E>(shape, inputs, tasks.heads(), y, final_states); });
}

template void ssd_forward(const ScanShape&, const ScanInputs<float>&, float*, float*, int);
template void ssd_forward(const ScanShape&, const ScanInputs<bf16>&, bf16*, float*, int);

}  // namespace bytekernels
