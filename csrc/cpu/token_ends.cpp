#include "pack.h"

#include <algorithm>
#include <vector>

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {

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
