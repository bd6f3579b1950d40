// pack on a grid: bytes of padded or ragged sequences to a flat axis, a BOS byte before each where there is one.
#pragma once

#include "cuda/vector.h"

namespace bytekernels {

// A thread writes aligned vectors of the output. Each byte of one is in a sequence found by its start, and where that
// sequence's bytes come from is one sum: byte o of the output, in sequence s, is byte o + shift_of(s) of the source.
struct PackKernel {
  const uint8_t* source;
  int64_t source_bytes;
  Starts starts;  // of the sequences in the output, in bytes
  int64_t sequences;
  int64_t stride;  // bytes from one padded sequence to the next, -1 where they lie one after another
  int bos;         // kNoBos for none
  Vectors out;
  int32_t* cu_out;  // where to write the starts, or null

  RAGGED_INLINE int64_t items() const {
    const int64_t offsets = cu_out ? sequences + 1 : 0;
    return out.count() > offsets ? out.count() : offsets;
  }

  RAGGED_INLINE int64_t shift_of(int64_t s) const {
    const int64_t added = bos == kNoBos ? 0 : 1;
    return stride < 0 ? -(s + 1) * added : s * stride - starts[s] - added;
  }

  RAGGED_INLINE void operator()(int64_t item, int64_t& s) const {
    if (cu_out && item <= sequences) cu_out[item] = static_cast<int32_t>(starts[item]);
    if (item >= out.count()) return;
    const int64_t begin = out.begin(item);
    Vector vector{0, 0};
    for_sequences_in(out, item, starts, sequences, s, [&](int64_t sequence, Range rows) {
      const Vector held = load(source, source_bytes, begin + shift_of(sequence));
      vector = merge(vector, held, rows.begin - begin, rows.end - begin);
      const int64_t first = starts[sequence];
      if (bos != kNoBos && first >= rows.begin) {
        vector = merge(vector, splat(static_cast<uint8_t>(bos)), first - begin, first + 1 - begin);
      }
    });
    store(out, item, vector);
  }
};

}  // namespace bytekernels
