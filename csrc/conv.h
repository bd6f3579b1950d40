// The causal depthwise convolution of packed sequences (bytekernels/conv/reference.py says what is computed).
#pragma once

#include <cstdint>

#include "rows.h"

namespace bytekernels {

constexpr int kLeastTaps = 2;
constexpr int kMostTaps = 4;

struct ConvShape {
  const int32_t* cu;
  int64_t sequences;
  int64_t channels;
  int taps;  // K, kLeastTaps to kMostTaps
};

// E is float or bf16. Null pointers stand for arguments that are not given.
template <class E>
struct ConvInputs {
  Rows<const E> x;      // [T, C]
  const float* weight;  // [C, K]
  const float* bias;    // [C]
  bool silu;
  const E* initial_states;  // [S, C, K-1]
};

// Contiguous, the shapes of the inputs. dbias and dinitial_states are null where the input is.
template <class E>
struct ConvGradients {
  E* dx;
  float* dweight;
  float* dbias;
  float* dinitial_states;
};

// Writes y [T, C] and final_states [S, C, K-1].
template <class E>
void conv_forward(const ConvShape& shape, const ConvInputs<E>& inputs, E* y, E* final_states, int threads);

// Writes the gradients, given those of y [T, C] and of final_states [S, C, K-1].
template <class E>
void conv_backward(const ConvShape& shape, const ConvInputs<E>& inputs, const E* dy, const E* dfinal_states,
                   const ConvGradients<E>& gradients, int threads);

}  // namespace bytekernels
