// One byte of Mamba2's mixer for each of several sequences (bytekernels/mixer/reference.py says what is computed).
#pragma once

#include <cstdint>

#include "rows.h"

namespace bytekernels {

struct StepShape {
  int64_t sequences;
  int64_t heads;
  int64_t headdim;
  int64_t groups;  // divides heads
  int64_t d_state;
  int taps;  // K, kLeastTaps to kMostTaps of conv.h

  int64_t inner() const { return heads * headdim; }
  int64_t channels() const { return inner() + 2 * groups * d_state; }
  int64_t width() const { return inner() + channels() + heads; }
};

// E is float or bf16. Null pointers stand for arguments that are not given.
template <class E>
struct StepInputs {
  Rows<const E> zxbcdt;      // [S, z | x | B | C | dt]
  const float* conv_weight;  // [C, K]
  const float* conv_bias;    // [C]
  const float* A;            // [H]
  const float* D;            // [H]
  const float* dt_bias;      // [H]
  const float* norm_weight;  // [H*P]
  const uint8_t* active;     // [S], 0: the sequence's state stays as it is, and nothing of its row is read
  float eps;
  float dt_min;
  float dt_max;
};

// What a step changes. The row that came j bytes ago lies in slot (position - j) mod K of the ring.
struct StepState {
  float* conv;        // [S, C, K], the ring
  int32_t* position;  // [S, H], the new row's slot, for the head's channels of x
  float* ssm;         // [S, H, P, N]
};

// Writes out [S, H*P], zeros for sequences that are not active.
template <class E>
void mixer_step(const StepShape& shape, const StepInputs<E>& inputs, const StepState& state, E* out, int threads);

}  // namespace bytekernels
