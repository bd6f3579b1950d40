// What the scan's forward and backward share: a chunk's operands as padded float32 tiles, its time steps and decays.
//
// Within a chunk of q <= kChunk bytes, with cs_t = A (Delta_0 + ... + Delta_t) and S0 the state before it,
//   y_t = exp(cs_t) S0 C_t + sum_{s<=t} L_ts (C_t . B_s) Delta_s x_s,   L_ts = exp(cs_t - cs_s),
//   S1  = exp(cs_q) S0 + sum_s exp(cs_q - cs_s) Delta_s x_s (x) B_s.
// Places after the q-th hold zeros, Delta = 0 among them.
#pragma once

#include <algorithm>
#include <atomic>

#include "../parallel.h"
#include "../ssd.h"
#include "arena.h"
#include "gemm.h"

namespace bytekernels {

constexpr int kChunk = 32;
static_assert(kChunk % kLanes == 0 && kChunk % kTileRows == 0);

inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

// Tasks are (sequence, group, block of the group's heads), in this order: whole groups while these are enough for the
// threads, else blocks of heads. What heads add up is added within blocks first, so that no bit depends on the choice.
class Tasks {
 public:
  Tasks(const ScanShape& shape, int threads)
      : shape_(shape),
        threads_(threads),
        per_group_(shape.heads / shape.groups),
        block_((per_group_ + kBlocksPerGroup - 1) / kBlocksPerGroup),
        heads_(shape.sequences * shape.groups < threads ? block_ : per_group_),
        parts_((per_group_ + heads_ - 1) / heads_) {}

  int64_t parts() const { return parts_; }  // of each group
  int64_t heads() const { return heads_; }  // of a task, at most
  int64_t count() const { return shape_.sequences * shape_.groups * parts_; }

  struct Task {
    int64_t sequence, group, part, first_head, last_head;  // heads [first, last)
    int64_t block;                                         // heads in a block, but for a group's last
  };

  Task operator[](int64_t index) const {
    const int64_t part = index % parts_, group = index / parts_ % shape_.groups;
    const int64_t first = part * heads_, last = std::min(first + heads_, per_group_);
    return {index / parts_ / shape_.groups, group, part, group * per_group_ + first, group * per_group_ + last, block_};
  }

  // Calls body(task) for each, on a make_worker() of each thread. Threads take the next task when they have done one.
  template <class MakeWorker>
  void run(MakeWorker&& make_worker) const {
    std::atomic<int64_t> next{0};
    const int64_t tasks = count();
    parallel_shares(static_cast<int>(std::min<int64_t>(std::max(threads_, 1), tasks)), [&](int) {
      auto worker = make_worker();
      for (int64_t i = next++; i < tasks; i = next++) worker((*this)[i]);
    });
  }

 private:
  static constexpr int64_t kBlocksPerGroup = 8;

  const ScanShape& shape_;
  int threads_;
  int64_t per_group_;
  int64_t block_;
  int64_t heads_;
  int64_t parts_;
};

// Sizes with their last axes padded to whole vectors.
struct PaddedSizes {
  int64_t headdim, d_state;

  explicit PaddedSizes(const ScanShape& shape)
      : headdim(round_up(shape.headdim, kLanes)), d_state(round_up(shape.d_state, kLanes)) {}
  int64_t state() const { return headdim * d_state; }
};

// What the heads of a group have in common.
struct GroupChunk {
  float* B;   // [Q, N]
  float* C;   // [Q, N]
  float* Bt;  // [N, Q]
  float* CB;  // [Q, Q], C_t . B_s

  static int64_t floats(int64_t d_state) { return 3 * kChunk * d_state + kChunk * kChunk; }

  GroupChunk(float* memory, int64_t d_state)
      : B(memory), C(B + kChunk * d_state), Bt(C + kChunk * d_state), CB(Bt + kChunk * d_state) {}

  template <class E>
  void fill(const ScanInputs<E>& inputs, const ScanShape& shape, int64_t group, int64_t row, int64_t q,
            int64_t padded) const {
    const int64_t n = shape.d_state;
    for (int64_t t = 0; t < kChunk; ++t) {
      load_row(t < q ? inputs.B[row + t] + group * n : nullptr, t < q ? n : 0, padded, B + t * padded);
      load_row(t < q ? inputs.C[row + t] + group * n : nullptr, t < q ? n : 0, padded, C + t * padded);
    }
    transpose(B, padded, Bt, kChunk, kChunk, padded);
    multiply(round_up(q, kTileRows), kChunk, {C, padded, 1}, {Bt, kChunk}, {CB, kChunk}, AllK{padded});
  }
};

// Rows [row, row + q) of one head as floats [Q, padded].
template <class E>
inline void load_chunk(Rows<const E> rows, int64_t row, int64_t q, int64_t offset, int64_t n, int64_t padded,
                       float* to) {
  for (int64_t t = 0; t < kChunk; ++t) {
    load_row(t < q ? rows[row + t] + offset : nullptr, t < q ? n : 0, padded, to + t * padded);
  }
}

// One head's time steps in a chunk. cs is kept as the sum of two floats, so that small differences of large sums
// stay exact.
struct Steps {
  alignas(kVectorBytes) float raw[kChunk];         // dt + dt_bias
  alignas(kVectorBytes) float free[kChunk];        // its softplus, before the clamp
  alignas(kVectorBytes) float delta[kChunk];       // Delta
  alignas(kVectorBytes) float from_start[kChunk];  // exp(cs_t)
  alignas(kVectorBytes) float to_end[kChunk];      // exp(cs_q - cs_t)
  alignas(kVectorBytes) float cs_high[kChunk];
  alignas(kVectorBytes) float cs_low[kChunk];
  float decay;  // exp(cs_q)

  template <class E>
  void fill(const ScanInputs<E>& inputs, int64_t head, int64_t row, int64_t q) {
    const float bias = inputs.dt_bias ? inputs.dt_bias[head] : 0.0f;
    for (int64_t t = 0; t < kChunk; ++t) raw[t] = t < q ? inputs.dt[row + t][head] + bias : 0.0f;
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      const Vec given = load(raw + t);
      const Vec step = inputs.dt_softplus ? softplus(given) : given;
      const Vec clamped = minimum(maximum(step, broadcast(inputs.dt_min)), broadcast(inputs.dt_max));
      store(free + t, step);
      store(delta + t, given == given ? clamped : given);  // a comparison with NaN is false: it must not be lost
    }
    double cs = 0;
    for (int64_t t = 0; t < kChunk; ++t) {
      if (t >= q) delta[t] = 0;
      cs += delta[t] * inputs.A[head];
      cs_high[t] = static_cast<float>(cs);
      cs_low[t] = static_cast<float>(cs - cs_high[t]);
    }
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      store(from_start + t, exp_of_nonpositive(load(cs_high + t)));
      store(to_end + t, decay_between(kChunk - 1, t));
    }
    decay = from_start[kChunk - 1];
  }

  // exp(cs_t - cs_s) for the kLanes places from s, as if none came after t.
  Vec decay_between(int64_t t, int64_t s) const {
    const Vec difference = (cs_high[t] - load(cs_high + s)) + (cs_low[t] - load(cs_low + s));
    return exp_of_nonpositive(minimum(difference, Vec{}));
  }

  // out [q, Q] = L, with zeros above the diagonal.
  void decays(int64_t q, float* out) const {
    const IntVec lanes = lane_numbers();
    for (int64_t t = 0; t < q; ++t) {
      for (int64_t s = 0; s < kChunk; s += kLanes) {
        const Vec value = s > t ? Vec{} : decay_between(t, s);
        store(out + t * kChunk + s, lanes + static_cast<int32_t>(s) > static_cast<int32_t>(t) ? Vec{} : value);
      }
    }
  }
};

// Rows of `values` [rows, padded] times their own factor.
inline void scale_rows(float* values, int64_t rows, int64_t padded, const float* factors) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(values + r * padded + i, factors[r] * load(values + r * padded + i));
    }
  }
}

// out [rows, padded] = values, rows times their own factor.
inline void scaled_rows(const float* values, int64_t rows, int64_t padded, const float* factors, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(out + r * padded + i, factors[r] * load(values + r * padded + i));
    }
  }
}

// States between the caller's [P, N] and padded [P, N]; null reads as zero.
inline void load_state(const float* from, const ScanShape& shape, const PaddedSizes& padded, float* to) {
  std::fill(to, to + padded.state(), 0.0f);
  if (!from) return;
  for (int64_t p = 0; p < shape.headdim; ++p) {
    std::copy_n(from + p * shape.d_state, shape.d_state, to + p * padded.d_state);
  }
}

inline void store_state(const float* from, const ScanShape& shape, const PaddedSizes& padded, float* to) {
  for (int64_t p = 0; p < shape.headdim; ++p) {
    std::copy_n(from + p * padded.d_state, shape.d_state, to + p * shape.d_state);
  }
}

}  // namespace bytekernels
