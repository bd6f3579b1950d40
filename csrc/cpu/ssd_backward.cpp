// The scan's backward: each task walks its sequence's chunks in reverse, carrying G = dL/dS, in blocks of chunks whose
// states it computes first.
//
// With dy the gradient before skip and gate, L and cs as in ssd_chunk.h, and W_us = dy_u . x_s, U = L o W,
// R_us = (C_u . B_s) U_us Delta_s, in a chunk that S0 enters and G leaves:
//   dC_u = exp(cs_u) S0^T dy_u + sum_s U_us Delta_s B_s
//   dB_s = Delta_s (exp(cs_q - cs_s) G^T x_s + sum_u U_us C_u)
//   dx_s = Delta_s (exp(cs_q - cs_s) G B_s + sum_u L_us (C_u . B_s) dy_u) + D dy_s
//   da_t = exp(cs_q) <G, S0> + sum_{u>=t} iS_u + sum_{s<t} iG_s + sum_{u>=t>s} R_us        (a = Delta A)
//   dDelta_s = sum_u R_us / Delta_s + iG_s / Delta_s + A da_s, each computed before Delta is multiplied in,
// where iS_u = exp(cs_u) dy_u . S0 C_u and iG_s = Delta_s exp(cs_q - cs_s) x_s . G B_s. No term of da is the difference
// of two large ones. The gradient of S0 is exp(cs_q) G + sum_u exp(cs_u) dy_u (x) C_u.
#include <vector>

#include "ssd_chunk.h"

namespace bytekernels {
namespace {

constexpr int kBlock = 16;  // chunks whose states are kept at a time

// A head's sums over its sequence.
struct Sums {
  double dA = 0, dD = 0, ddt_bias = 0;
};

// Where the gradients of B and C go: to the caller's tensors, or to float32 parts of them that are summed later.
template <class E>
struct Destination {
  E* rows;       // [T, G, N]
  float* parts;  // [parts, T, G, N], null where a task holds a whole group

  void store(const ScanShape& shape, const Tasks::Task& task, int64_t row, const float* values) const {
    const int64_t width = shape.groups * shape.d_state, offset = row * width + task.group * shape.d_state;
    if (parts) {
      std::copy_n(values, shape.d_state, parts + task.part * shape.cu[shape.sequences] * width + offset);
    } else {
      store_row(values, shape.d_state, rows + offset);
    }
  }
};

template <class E>
class Backward {
 public:
  Backward(const ScanShape& shape, const ScanInputs<E>& inputs, const E* dy, const float* dfinal_states,
           const ScanGradients<E>& gradients, int64_t heads, Destination<E> dB, Destination<E> dC, Sums* sums)
      : shape_(shape),
        inputs_(inputs),
        padded_(shape),
        dy_rows_{dy, shape.heads * shape.headdim},
        dfinal_states_(dfinal_states),
        gradients_(gradients),
        dB_to_(dB),
        dC_to_(dC),
        sums_(sums),
        arena_(kBlock * (GroupChunk::floats(padded_.d_state) + 4 * kChunk * padded_.d_state + padded_.state()) +
               (heads + 1) * padded_.state() + kChunk * (4 * padded_.headdim + 2 * padded_.d_state + 3 * kChunk)),
        dB_(arena_.take(kBlock * kChunk * padded_.d_state)),
        dC_(arena_.take(kBlock * kChunk * padded_.d_state)),
        total_dB_(arena_.take(kBlock * kChunk * padded_.d_state)),
        total_dC_(arena_.take(kBlock * kChunk * padded_.d_state)),
        states_(arena_.take(kBlock * padded_.state())),
        carry_(arena_.take(heads * padded_.state())),
        turned_(arena_.take(padded_.state())),
        x_(arena_.take(kChunk * padded_.headdim)),
        xt_(arena_.take(kChunk * padded_.headdim)),
        dy_(arena_.take(kChunk * padded_.headdim)),
        dxt_(arena_.take(kChunk * padded_.headdim)),
        weighted_(arena_.take(kChunk * padded_.d_state)),
        part_(arena_.take(kChunk * padded_.d_state)),
        decays_(arena_.take(kChunk * kChunk)),
        mixing_(arena_.take(kChunk * kChunk)),
        products_(arena_.take(kChunk * kChunk)) {
    for (int c = 0; c < kBlock; ++c) {
      groups_.emplace_back(arena_.take(GroupChunk::floats(padded_.d_state)), padded_.d_state);
    }
  }

  void operator()(const Tasks::Task& task) {
    const int64_t begin = shape_.cu[task.sequence], end = shape_.cu[task.sequence + 1];
    const int64_t heads = task.last_head - task.first_head;
    const int64_t blocks = (end - begin + kBlockRows - 1) / kBlockRows;
    const int64_t first_state = (task.sequence * shape_.heads + task.first_head) * state_size();
    for (int64_t h = 0; h < heads; ++h) {
      load_state(dfinal_states_ + first_state + h * state_size(), shape_, padded_, carry(h));
    }
    Arena arena(blocks * heads * padded_.state());
    float* const starts = arena.take(blocks * heads * padded_.state());
    if (blocks > 0) fill_starts(task, begin, blocks, first_state, starts);
    for (int64_t b = blocks - 1; b >= 0; --b) {
      const int64_t first = begin + b * kBlockRows;
      block(task, first, std::min(first + kBlockRows, end), starts + b * heads * padded_.state());
    }
    for (int64_t h = 0; h < heads && gradients_.dinitial_states; ++h) {
      store_state(carry(h), shape_, padded_, gradients_.dinitial_states + first_state + h * state_size());
    }
  }

 private:
  static constexpr int64_t kBlockRows = kBlock * kChunk;

  int64_t state_size() const { return shape_.headdim * shape_.d_state; }
  float* carry(int64_t h) const { return carry_ + h * padded_.state(); }
  float* state(int64_t c) const { return states_ + c * padded_.state(); }

  // The states that enter each block: starts [blocks, heads, P, N].
  void fill_starts(const Tasks::Task& task, int64_t begin, int64_t blocks, int64_t first_state, float* starts) {
    const int64_t heads = task.last_head - task.first_head, size = padded_.state();
    for (int64_t h = 0; h < heads; ++h) {
      const float* initial = inputs_.initial_states;
      load_state(initial ? initial + first_state + h * state_size() : nullptr, shape_, padded_, starts + h * size);
    }
    for (int64_t b = 1; b < blocks; ++b) {
      float* const here = starts + b * heads * size;
      std::copy_n(here - heads * size, heads * size, here);
      for (int64_t row = begin + (b - 1) * kBlockRows; row < begin + b * kBlockRows; row += kChunk) {
        load_chunk(inputs_.B, row, kChunk, task.group * shape_.d_state, shape_.d_state, padded_.d_state, part_);
        for (int64_t h = 0; h < heads; ++h) advance(task.first_head + h, row, part_, here + h * size);
      }
    }
  }

  // Rows [first, last): at most kBlock chunks, entered by the heads' states in `starts`.
  void block(const Tasks::Task& task, int64_t first, int64_t last, const float* starts) {
    const int64_t chunks = chunks_of(last - first), n = padded_.d_state;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t row = first + c * kChunk;
      groups_[c].fill(inputs_, shape_, task.group, row, std::min<int64_t>(kChunk, last - row), n);
    }
    for (float* sum : {dB_, dC_, total_dB_, total_dC_}) std::fill_n(sum, chunks * kChunk * n, 0.0f);
    for (int64_t head = task.first_head; head < task.last_head; ++head) {
      const int64_t h = head - task.first_head;
      std::copy_n(starts + h * padded_.state(), padded_.state(), states_);
      for (int64_t c = 0; c + 1 < chunks; ++c) {
        std::copy_n(state(c), padded_.state(), state(c + 1));
        advance(head, first + c * kChunk, groups_[c].B, state(c + 1));
      }
      for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t row = first + c * kChunk, q = std::min<int64_t>(kChunk, last - row);
        chunk(head, row, q, groups_[c], state(c), carry(h), dB_ + c * kChunk * n, dC_ + c * kChunk * n,
              sums_[task.sequence * shape_.heads + head]);
      }
      if ((h + 1) % task.block == 0 || head + 1 == task.last_head) {
        move_sums(dB_, chunks * kChunk * n, total_dB_);
        move_sums(dC_, chunks * kChunk * n, total_dC_);
      }
    }
    for (int64_t row = first; row < last; ++row) {
      dB_to_.store(shape_, task, row, total_dB_ + (row - first) * n);
      dC_to_.store(shape_, task, row, total_dC_ + (row - first) * n);
    }
  }

  // Adds the sums of a block of heads to those of all, and clears them.
  static void move_sums(float* sums, int64_t count, float* total) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(total + i, load(total + i) + load(sums + i));
      store(sums + i, Vec{});
    }
  }

  // state [P, N] from before to after a whole chunk.
  void advance(int64_t head, int64_t row, const float* B, float* state) {
    const int64_t n = padded_.d_state, p = padded_.headdim;
    steps_.fill(inputs_, head, row, kChunk);
    load_chunk(inputs_.x, row, kChunk, head * shape_.headdim, shape_.headdim, p, x_);
    for (int64_t s = 0; s < kChunk; s += kLanes) {
      store(row_ + s, load(steps_.to_end + s) * load(steps_.delta + s));
    }
    scaled_rows(B, kChunk, n, row_, weighted_);
    multiply_add(p, n, {x_, 1, p}, {weighted_, n}, {state, n}, steps_.decay, AllK{kChunk});
  }

  // Gradients of rows [row, row + q) of one head, and the carry from after to before them.
  void chunk(int64_t head, int64_t row, int64_t q, const GroupChunk& group, const float* S0, float* G, float* dB,
             float* dC, Sums& sums) {
    const int64_t n = padded_.d_state, p = padded_.headdim, tiles = round_up(q, kTileRows);
    steps_.fill(inputs_, head, row, q);
    load_chunk(inputs_.x, row, q, head * shape_.headdim, shape_.headdim, p, x_);
    load_chunk(dy_rows_, row, q, head * shape_.headdim, shape_.headdim, p, dy_);
    steps_.decays(q, decays_);
    for (int64_t i = 0; i < q * kChunk; i += kLanes) store(mixing_ + i, load(decays_ + i) * load(group.CB + i));
    if (inputs_.z.data) gate(head, row, q, group, S0);
    transpose(x_, p, xt_, kChunk, kChunk, p);
    multiply(tiles, kChunk, {dy_, p, 1}, {xt_, kChunk}, {products_, kChunk}, AllK{p});
    float trace = 0;  // sum of dy_t . x_t
    for (int64_t t = 0; t < q; ++t) trace += products_[t * kChunk + t];
    sums.dD += trace;
    mix(q, group.CB);

    // dC, and iS into from_state_
    multiply(tiles, n, {dy_, p, 1}, {S0, n}, {part_, n}, AllK{p});
    scale_rows(part_, q, n, steps_.from_start);
    for (int64_t u = 0; u < q; ++u) from_state_[u] = dot(group.C + u * n, part_ + u * n, n);
    scaled_rows(group.B, q, n, steps_.delta, weighted_);
    multiply_add(tiles, n, {products_, kChunk, 1}, {weighted_, n}, {part_, n}, 1, LowerLeft{q});
    for (int64_t i = 0; i < q * n; i += kLanes) store(dC + i, load(dC + i) + load(part_ + i));

    // dB, and iG / Delta into to_carry_
    multiply(tiles, n, {x_, p, 1}, {G, n}, {part_, n}, AllK{p});
    scale_rows(part_, q, n, steps_.to_end);
    for (int64_t s = 0; s < q; ++s) to_carry_[s] = dot(group.B + s * n, part_ + s * n, n);
    multiply_add(tiles, n, {products_, 1, kChunk}, {group.C, n}, {part_, n}, 1, UpperLeft{q});
    scale_rows(part_, q, n, steps_.delta);
    for (int64_t i = 0; i < q * n; i += kLanes) store(dB + i, load(dB + i) + load(part_ + i));

    finish_dx(head, row, q, group, G);
    finish_steps(head, row, q, steps_.decay * dot(G, S0, padded_.state()), sums);

    // G from the chunk's end to its start
    scaled_rows(group.C, q, n, steps_.from_start, weighted_);
    multiply_add(p, n, {dy_, 1, p}, {weighted_, n}, {G, n}, steps_.decay, AllK{q});
  }

  // dz, and dy from the gradient after the gate to the one before it: y silu(z) with y computed again.
  void gate(int64_t head, int64_t row, int64_t q, const GroupChunk& group, const float* S0) {
    const int64_t n = padded_.d_state, p = padded_.headdim, tiles = round_up(q, kTileRows);
    float* const y = dxt_;
    transpose(S0, n, turned_, p, p, n);
    multiply(tiles, p, {group.C, n, 1}, {turned_, p}, {y, p}, AllK{n});
    scale_rows(y, q, p, steps_.from_start);
    scaled_rows(x_, q, p, steps_.delta, xt_);
    multiply_add(tiles, p, {mixing_, kChunk, 1}, {xt_, p}, {y, p}, 1, LowerLeft{q});
    const float skip = inputs_.D ? inputs_.D[head] : 0.0f;
    for (int64_t t = 0; t < q; ++t) {
      float* const z = xt_;
      load_row(inputs_.z[row + t] + head * shape_.headdim, shape_.headdim, p, z);
      for (int64_t i = 0; i < p; i += kLanes) {
        const Vec gated = load(z + i), share = sigmoid(gated), dy = load(dy_ + t * p + i);
        const Vec ungated = load(y + t * p + i) + skip * load(x_ + t * p + i);
        store(y + t * p + i, dy * ungated * share * (1.0f + gated * (1.0f - share)));
        store(dy_ + t * p + i, dy * gated * share);
      }
      store_row(y + t * p, shape_.headdim, gradients_.dz + ((row + t) * shape_.heads + head) * shape_.headdim);
    }
  }

  // products_ from W to U; sum_u R_us / Delta_s into direct_; sum_{u>=t>s} R_us into crossing_.
  void mix(int64_t q, const float* CB) {
    constexpr int kVectors = kChunk / kLanes;
    const IntVec lanes = lane_numbers();
    Vec later[kVectors]{};  // for each s, the sum of R_us / Delta_s over u >= t
    for (int64_t t = q - 1; t >= 0; --t) {
      Vec crossing{};
      for (int v = 0; v < kVectors; ++v) {
        const int64_t s = v * kLanes, i = t * kChunk + s;
        const Vec mixed = load(decays_ + i) * load(products_ + i);
        store(products_ + i, mixed);
        later[v] += load(CB + i) * mixed;
        const IntVec before = lanes + static_cast<int32_t>(s) < static_cast<int32_t>(t);
        crossing += before ? later[v] * load(steps_.delta + s) : Vec{};
      }
      crossing_[t] = sum_of_lanes(crossing);
    }
    for (int v = 0; v < kVectors; ++v) store(direct_ + v * kLanes, later[v]);
  }

  void finish_dx(int64_t head, int64_t row, int64_t q, const GroupChunk& group, const float* G) {
    const int64_t n = padded_.d_state, p = padded_.headdim;
    multiply(p, kChunk, {G, n, 1}, {group.Bt, kChunk}, {dxt_, kChunk}, AllK{n});
    scale_columns(dxt_, steps_.to_end);
    multiply_add(p, kChunk, {dy_, 1, p}, {mixing_, kChunk}, {dxt_, kChunk}, 1, LowerRight{q});
    scale_columns(dxt_, steps_.delta);
    float* const dx = xt_;
    transpose(dxt_, kChunk, dx, p, p, kChunk);
    const float skip = inputs_.D ? inputs_.D[head] : 0.0f;
    for (int64_t t = 0; t < q; ++t) {
      for (int64_t i = t * p; i < (t + 1) * p; i += kLanes) store(dx + i, load(dx + i) + skip * load(dy_ + i));
      store_row(dx + t * p, shape_.headdim, gradients_.dx + ((row + t) * shape_.heads + head) * shape_.headdim);
    }
  }

  // [P, Q] times a factor for each column.
  void scale_columns(float* values, const float* factors) const {
    for (int64_t i = 0; i < padded_.headdim; ++i) {
      for (int64_t s = 0; s < kChunk; s += kLanes) {
        store(values + i * kChunk + s, load(values + i * kChunk + s) * load(factors + s));
      }
    }
  }

  // ddt, and the head's sums. `through` is exp(cs_q) <G, S0>.
  void finish_steps(int64_t head, int64_t row, int64_t q, float through, Sums& sums) {
    const float A = inputs_.A[head];
    float earlier = 0, later = 0;  // sums of iG before t and of iS from t on
    for (int64_t t = 0; t < q; ++t) {
      row_[t] = through + earlier + crossing_[t];
      earlier += steps_.delta[t] * to_carry_[t];
    }
    float dA = 0, dbias = 0;
    for (int64_t t = q - 1; t >= 0; --t) {
      later += from_state_[t];
      const float da = row_[t] + later;
      dA += steps_.delta[t] * da;
      const bool inside = steps_.free[t] >= inputs_.dt_min && steps_.free[t] <= inputs_.dt_max;
      row_[t] = inside ? direct_[t] + to_carry_[t] + A * da : 0.0f;
    }
    if (inputs_.dt_softplus) {
      for (int64_t t = 0; t < kChunk; t += kLanes) store(row_ + t, load(row_ + t) * sigmoid(load(steps_.raw + t)));
    }
    for (int64_t t = 0; t < q; ++t) {
      dbias += row_[t];
      gradients_.ddt[(row + t) * shape_.heads + head] = row_[t];
    }
    sums.dA += dA;
    sums.ddt_bias += dbias;
  }

  const ScanShape& shape_;
  const ScanInputs<E>& inputs_;
  PaddedSizes padded_;
  Rows<const E> dy_rows_;
  const float* dfinal_states_;
  const ScanGradients<E>& gradients_;
  Destination<E> dB_to_;
  Destination<E> dC_to_;
  Sums* sums_;  // [S, H]
  Arena arena_;
  std::vector<GroupChunk> groups_;
  float* dB_;        // [kBlock Q, N], of a block of heads
  float* dC_;        // [kBlock Q, N]
  float* total_dB_;  // [kBlock Q, N], of all the task's heads
  float* total_dC_;  // [kBlock Q, N]
  float* states_;    // [kBlock, P, N], the state before each chunk
  float* carry_;     // [heads, P, N], G
  float* turned_;    // [N, P]
  float* x_;         // [Q, P]
  float* xt_;        // [P, Q]
  float* dy_;        // [Q, P]
  float* dxt_;       // [P, Q]
  float* weighted_;  // [Q, N]
  float* part_;      // [Q, N]
  float* decays_;    // [Q, Q], L
  float* mixing_;    // [Q, Q], L o CB
  float* products_;  // [Q, Q], W, then U
  Steps steps_;
  alignas(kVectorBytes) float row_[kChunk]{};
  alignas(kVectorBytes) float from_state_[kChunk];  // iS
  alignas(kVectorBytes) float to_carry_[kChunk];    // iG / Delta
  alignas(kVectorBytes) float crossing_[kChunk];
  alignas(kVectorBytes) float direct_[kChunk];
};

// rows [T, G, N] = the sum of the parts [parts, T, G, N], in order.
template <class E>
void sum_parts(const float* parts, int64_t count, int64_t size, E* rows, int threads) {
  parallel_for(size, 1 << 14, threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      float sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
      rows[i] = from_float<E>(sum);
    }
  });
}

}  // namespace

template <class E>
void ssd_backward(const ScanShape& shape, const ScanInputs<E>& inputs, const E* dy, const float* dfinal_states,
                  const ScanGradients<E>& gradients, int threads) {
  const Tasks tasks(shape, threads);
  const int64_t size = shape.cu[shape.sequences] * shape.groups * shape.d_state;
  std::vector<Sums> sums(shape.sequences * shape.heads);
  std::unique_ptr<float[]> parts;
  if (tasks.parts() > 1) parts.reset(new float[2 * tasks.parts() * size]);
  float* const parts_of_C = parts.get() + tasks.parts() * size;
  tasks.run([&] {
    return Backward<E>(shape, inputs, dy, dfinal_states, gradients, tasks.heads(), {gradients.dB, parts.get()},
                       {gradients.dC, parts ? parts_of_C : nullptr}, sums.data());
  });
  if (parts) {
    sum_parts(parts.get(), tasks.parts(), size, gradients.dB, threads);
    sum_parts(parts_of_C, tasks.parts(), size, gradients.dC, threads);
  }
  for (int64_t h = 0; h < shape.heads; ++h) {
    Sums total;
    for (int64_t s = 0; s < shape.sequences; ++s) {
      const Sums& sum = sums[s * shape.heads + h];
      total.dA += sum.dA;
      total.dD += sum.dD;
      total.ddt_bias += sum.ddt_bias;
    }
    gradients.dA[h] = static_cast<float>(total.dA);
    if (gradients.dD) gradients.dD[h] = static_cast<float>(total.dD);
    if (gradients.ddt_bias) gradients.ddt_bias[h] = static_cast<float>(total.ddt_bias);
  }
}

template void ssd_backward(const ScanShape&, const ScanInputs<float>&, const float*, const float*,
                           const ScanGradients<float>&, int);
template void ssd_backward(const ScanShape&, const ScanInputs<bf16>&, const bf16*, const float*,
                           const ScanGradients<bf16>&, int);

}  // namespace bytekernels
