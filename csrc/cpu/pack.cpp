#include "pack.h"

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {

void pack_documents(const uint8_t* const* documents, int bos, const int32_t* cu, int64_t sequences, uint8_t* ids,
                    int threads) {
  const int64_t shift = bos == kNoBos ? 0 : 1;
  parallel_for(cu[sequences], grain_of(1), threads, [&](Range share) {
    const Copy copy(cu[sequences]);
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      if (shift && rows.begin == cu[s]) ids[rows.begin++] = static_cast<uint8_t>(bos);
      copy(ids + rows.begin, documents[s] + (rows.begin - cu[s] - shift), rows.size());
    });
  });
}

void pack_padded(const uint8_t* padded, const int32_t* cu, int64_t sequences, int64_t length, int64_t row_bytes,
                 uint8_t* values, int threads) {
  parallel_for(cu[sequences], grain_of(row_bytes), threads, [&](Range share) {
    const Copy copy(cu[sequences] * row_bytes);
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      const uint8_t* source = padded + (s * length + rows.begin - cu[s]) * row_bytes;
      copy(values + rows.begin * row_bytes, source, rows.size() * row_bytes);
    });
  });
}

}  // namespace bytekernels
