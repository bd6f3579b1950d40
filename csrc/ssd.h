// Mamba2's scan of packed sequences (bytekernels/ssd/reference.py says what is computed).
#pragma once

#include <cstdint>

#include "rows.h"

namespace bytekernels {

struct ScanShape {
  const int32_t* cu;
  int64_t sequences;
  int64_t heads;
  int64_t headdim;
  int64_t groups;  // divides heads
  int64_t d_state;
};

// E is float or bf16. Null pointers stand for arguments that are not given.
template <class E>
struct ScanInputs {
  Rows<const E> x;       // [T, H, P]
  Rows<const float> dt;  // [T, H]
  const float* A;        // [H]
  Rows<const E> B;       // [T, G, N]
  Rows<const E> C;       // [T, G, N]
  const float* D;        // [H]
  Rows<const E> z;       // [T, H, P]
  const float* dt_bias;  // [H]
  bool dt_softplus;
  float dt_min;
  float dt_max;
  const float* initial_states;  // [S, H, P, N]
};

// Contiguous, the shapes of the inputs. dz, dD, ddt_bias and dinitial_states are null where the input is.
template <class E>
struct ScanGradients {
  E* dx;
  float* ddt;
  float* dA;
  E* dB;
  E* dC;
  float* dD;
  E* dz;
  float* ddt_bias;
  float* dinitial_states;
};

// Writes y [T, H, P] and final_states [S, H, P, N].
template <class E>
void ssd_forward(const ScanShape& shape, const ScanInputs<E>& inputs, E* y, float* final_states, int threads);

// Writes the gradients, given those of y [T, H, P] and of final_states [S, H, P, N].
template <class E>
void ssd_backward(const ScanShape& shape, const ScanInputs<E>& inputs, const E* dy, const float* dfinal_states,
                  const ScanGradients<E>& gradients, int threads);

}  // namespace bytekernels
