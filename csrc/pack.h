// pack: packed batches from documents and padded rows, and back; targets, token ends, and where rows lie. Each op has a
// file in cpu/, and one in cuda/ (there on a grid of threads: cuda/launch.h).
//
// Arrays are contiguous and of the sizes given; offsets are well formed (ragged.h): bind/pack.cpp checks both.
#pragma once

#include <cstdint>

#include "ragged.h"

namespace bytekernels {

// ids[cu[s] ..] = bos (unless kNoBos), then documents[s], whose lengths the offsets were made from.
void pack_documents(const uint8_t* const* documents, int bos, const int32_t* cu, int64_t sequences, uint8_t* ids,
                    int threads);

// padded [sequences, length, row_bytes] = values [total, row_bytes], and `pad` (element_bytes, which divides
// row_bytes) after each sequence's end. No sequence is longer than `length`.
void unpack(const uint8_t* values, const int32_t* cu, int64_t sequences, const uint8_t* pad, int64_t element_bytes,
            int64_t row_bytes, int64_t length, uint8_t* padded, int threads);

// values [total, row_bytes] = the first cu[s + 1] - cu[s] rows of each of padded [sequences, length, row_bytes].
// No sequence is longer than `length`.
void pack_padded(const uint8_t* padded, const int32_t* cu, int64_t sequences, int64_t length, int64_t row_bytes,
                 uint8_t* values, int threads);

// targets[t] = ids[t + 1], + 256 where boundary[t + 1]; kIgnore on each sequence's last row. `boundary` may be null.
void next_byte_targets(const uint8_t* ids, const uint8_t* boundary, const int32_t* cu, int64_t sequences, int64_t total,
                       int64_t* targets, int threads);

// sequence[t] = s and position[t] = t - cu[s], where row t is of sequence s.
void row_index(const int32_t* cu, int64_t sequences, int32_t* sequence, int32_t* position, int threads);

// What is wrong with the tokens of one sequence.
struct TokenFault {
  int64_t sequence = -1;  // -1: nothing
  int64_t token = -1;     // the token of no or negative length, -1 if it is the sum that is wrong
  int64_t sum = 0;        // of the sequence's token lengths
};

// ends[t] = 1 on the last byte of each token, and on the first byte of each sequence with `bos`, else 0. The lengths
// of a sequence's tokens, each at least 1, sum to its bytes (after BOS). Returns the fault of the first sequence that
// has one; nothing is written beyond a sequence's own rows even then.
TokenFault token_end_mask(const int32_t* token_lengths, const int32_t* token_cu, const int32_t* cu, int64_t sequences,
                          int64_t total, bool bos, uint8_t* ends, int threads);

}  // namespace bytekernels
