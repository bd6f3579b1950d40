#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // less than this is copied sooner than a thread wakes

int64_t grain_of(int64_t row_bytes) { return std::max<int64_t>(kGrainBytes / std::max<int64_t>(row_bytes, 1), 1); }

// Calls piece(s, rows) for each sequence s with rows among `share`, in order, `rows` being the part that is.
template <class Piece>
void for_each_piece(const int32_t* cu, int64_t sequences, Range share, Piece&& piece) {
  int64_t row = share.begin;
  for (int64_t s = sequence_of(cu, sequences, row); row < share.end; ++s) {
    const int64_t end = std::min<int64_t>(cu[s + 1], share.end);
    if (end > row) piece(s, Range{row, end});
    row = end;
  }
}

void fill(uint8_t* out, int64_t bytes, const uint8_t* element, int64_t element_bytes) {
  if (bytes == 0) return;
  if (std::all_of(element, element + element_bytes, [&](uint8_t byte) { return byte == element[0]; })) {
    std::memset(out, element[0], bytes);
    return;
  }
  std::memcpy(out, element, element_bytes);
  for (int64_t filled = element_bytes; filled < bytes;) {
    const int64_t count = std::min(filled, bytes - filled);
    std::memcpy(out + filled, out, count);
    filled += count;
  }
}

}  // namespace

void pack_documents(const uint8_t* const* documents, int bos, const int32_t* cu, int64_t sequences, uint8_t* ids,
                    int threads) {
  const int64_t shift = bos == kNoBos ? 0 : 1;
  parallel_for(cu[sequences], grain_of(1), threads, [&](Range share) {
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      if (shift && rows.begin == cu[s]) ids[rows.begin++] = static_cast<uint8_t>(bos);
      if (rows.size() > 0) std::memcpy(ids + rows.begin, documents[s] + (rows.begin - cu[s] - shift), rows.size());
    });
  });
}

void unpack(const uint8_t* values, const int32_t* cu, int64_t sequences, const uint8_t* pad, int64_t element_bytes,
            int64_t row_bytes, int64_t length, uint8_t* padded, int threads) {
  parallel_for(sequences * length, grain_of(row_bytes), threads, [&](Range share) {
    for (int64_t row = share.begin; row < share.end;) {
      const int64_t s = row / length;
      const int64_t start = s * length;  // of the padded sequence, among padded rows
      const int64_t end = std::min(start + length, share.end);
      const int64_t filled = std::clamp<int64_t>(start + cu[s + 1] - cu[s], row, end);
      if (filled > row) {
        const uint8_t* source = values + (cu[s] + row - start) * row_bytes;
        std::memcpy(padded + row * row_bytes, source, (filled - row) * row_bytes);
      }
      fill(padded + filled * row_bytes, (end - filled) * row_bytes, pad, element_bytes);
      row = end;
    }
  });
}

void pack_padded(const uint8_t* padded, const int32_t* cu, int64_t sequences, int64_t length, int64_t row_bytes,
                 uint8_t* values, int threads) {
  parallel_for(cu[sequences], grain_of(row_bytes), threads, [&](Range share) {
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      const uint8_t* source = padded + (s * length + rows.begin - cu[s]) * row_bytes;
      std::memcpy(values + rows.begin * row_bytes, source, rows.size() * row_bytes);
    });
  });
}

void next_byte_targets(const uint8_t* ids, const uint8_t* boundary, const int32_t* cu, int64_t sequences, int64_t total,
                       int64_t* targets, int threads) {
  parallel_for(total, grain_of(sizeof(int64_t)), threads, [&](Range share) {
    const int64_t end = std::min(share.end, total - 1);
    if (boundary) {
      for (int64_t t = share.begin; t < end; ++t) targets[t] = ids[t + 1] + (boundary[t + 1] ? 256 : 0);
    } else {
      for (int64_t t = share.begin; t < end; ++t) targets[t] = ids[t + 1];
    }
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      if (rows.end == cu[s + 1]) targets[rows.end - 1] = kIgnore;
    });
  });
}

TokenFault token_end_mask(const int32_t* token_lengths, const int32_t* token_cu, const int32_t* cu, int64_t sequences,
                          int64_t total, bool bos, uint8_t* ends, int threads) {
  // Sequences, not rows, are shared out, by where they start: a token's end is known only from the sequence's start.
  const int shares = shares_for(total, grain_of(1), threads);
  std::vector<TokenFault> faults(shares);
  parallel_shares(shares, [&](int share) {
    const Range rows = share_of(total, shares, share);
    const int64_t first = share == 0 ? 0 : first_starting_at(cu, sequences, rows.begin);
    const int64_t last = share == shares - 1 ? sequences : first_starting_at(cu, sequences, rows.end);
    if (first >= last) return;
    std::fill(ends + cu[first], ends + cu[last], uint8_t{0});
    for (int64_t s = first; s < last; ++s) {
      int64_t position = cu[s];  // where the next token starts
      const int64_t end = cu[s + 1];
      if (bos && position < end) ends[position++] = 1;
      int64_t sum = 0;
      for (int64_t token = token_cu[s]; token < token_cu[s + 1]; ++token) {
        const int64_t length = token_lengths[token];
        if (length < 1) {
          faults[share] = {s, token, length};
          return;
        }
        sum += length;
        if (position + sum <= end) ends[position + sum - 1] = 1;
      }
      if (position + sum != end) {
        faults[share] = {s, -1, sum};
        return;
      }
    }
  });
  for (const TokenFault& fault : faults) {
    if (fault.sequence >= 0) return fault;
  }
  return {};
}

}  // namespace bytekernels
