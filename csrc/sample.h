// One draw from each row of logits (bytekernels/sample/reference.py says what is computed).
#pragma once

#include <cstdint>

namespace bytekernels {

struct SampleInputs {
  const float* logits;       // [S, V]
  const int64_t* seeds;      // [S]
  const int64_t* counters;   // [S]
  const float* temperature;  // [S], finite and >= 0; 0: the greatest logit
  const int32_t* top_k;      // [S], >= 0; 0 and from V on: all
  const float* top_p;        // [S], in [0, 1]; 1: all
  const float* min_p;        // [S], in [0, 1]
};

// Writes drawn [S]: an index below V, or -1 where nothing can be drawn: a row holds NaN or its greatest logit is not
// finite, or a setting is out of range. A row's draw depends on nothing but the row.
void sample(int64_t rows, int64_t vocabulary, const SampleInputs& inputs, int64_t* drawn, int threads);

}  // namespace bytekernels
