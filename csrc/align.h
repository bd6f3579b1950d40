// align: a batch of training data, cut from a corpus, in one pass. Kernel in cpu/align.cpp.
//
// bytekernels/align/reference.py says what is computed. Spans and offsets are checked (bind/align.cpp); the lengths of
// the tokens are not.
#pragma once

#include <cstdint>

#include "pack.h"

namespace bytekernels {

// What a sequence takes from the corpus.
struct AlignSpan {
  int64_t first_byte;
  int64_t bytes;
  int64_t first_token;
  int64_t tokens;
  bool end;  // an EOS follows
};

// L, of the tokens' lengths, is uint16_t or int32_t.
template <class L>
struct AlignInputs {
  const uint8_t* text;
  const int32_t* token_ids;
  const L* token_lengths;
  const AlignSpan* spans;  // [S], within the text and the tokens
  int64_t bos_id;
  int64_t eos_id;
  uint8_t bos;
  uint8_t eos;
};

struct AlignOutputs {
  uint8_t* ids;             // [T]
  const int32_t* cu;        // [S + 1]: cu[s + 1] - cu[s] = 1 + bytes + end
  uint8_t* token_end;       // [T]
  int64_t* token_ids;       // [M]
  const int32_t* token_cu;  // [S + 1]: token_cu[s + 1] - token_cu[s] = 1 + tokens + end
  int64_t* targets;         // [T], may be null
};

// Writes ids, token_end, token_ids and targets. Returns the fault of the first sequence whose tokens have one, `token`
// being a place in token_lengths; nothing is written beyond a sequence's own rows even then.
template <class L>
TokenFault align_pack(const AlignInputs<L>& inputs, int64_t sequences, const AlignOutputs& outputs, int threads);

}  // namespace bytekernels
