// From chunks back to bytes (bytekernels/dechunk/reference.py says what is computed).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ragged.h"
#include "rows.h"

namespace bytekernels {

// T `rows` of bytes, and chunks [room, width] cut by cu_chunks into sequences.
struct DechunkShape {
  const int32_t* chunk_of;   // [T]
  const int32_t* index;      // [room]
  const int32_t* cu_chunks;  // [S + 1]: offsets of all chunks, of which those beyond the room were lost
  int64_t sequences;
  int64_t rows;
  int64_t room;
  int64_t width;

  // Chunks that have a row: the first of them all.
  int64_t held() const { return std::min<int64_t>(cu_chunks[sequences], room); }

  // The chunks of the sequence that chunk m < held() belongs to, without lost ones.
  Range sequence(int64_t m) const {
    const int64_t s = sequence_of(cu_chunks, sequences, m);
    return {cu_chunks[s], std::min<int64_t>(cu_chunks[s + 1], held())};
  }
};

// E, of the chunks, and R, of the residual, are float or bf16; null pointers stand for arguments that are not given.
// Sums are in float32, in orders that the shape alone decides; those of a sequence do not depend on the others.

// The wider of two element types.
template <class E, class R>
using Wider = std::conditional_t<std::is_same_v<E, R>, E, float>;

// Writes out [T, width].
template <class E, class R>
void dechunk(const DechunkShape& shape, Rows<const E> chunks, const float* weight, const float* null,
             Rows<const R> residual, Wider<E, R>* out, int threads);

// Contiguous; each but the first is null where its input is, or where its gradient is not wanted.
template <class E>
struct DechunkGradients {
  E* dchunks;          // [room, width]
  float* dweight;      // [room]
  float* dnull;        // [width]
  float* dconfidence;  // [T]
};

// Writes the gradients, given that of out, du [T, width] in E or the residual's wider type.
template <class E, class U>
void dechunk_backward(const DechunkShape& shape, Rows<const E> chunks, const float* weight, const float* null,
                      const U* du, const DechunkGradients<E>& gradients, int threads);

}  // namespace bytekernels
