#include "constrain.h"

#include <algorithm>

#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 2048;  // bytes worth a thread

}  // namespace

void constrain_ends(const ConstrainedText& text, const int32_t* cu, int64_t sequences, int64_t total, uint8_t* ends,
                    int threads) {
  parallel_for(total, kGrain, threads, [&](Range share) {
    const int64_t stop = first_starting_at(cu, sequences, share.end);
    for (int64_t s = first_starting_at(cu, sequences, share.begin); s < stop; ++s) {
      const Range rows{cu[s], cu[s + 1]};
      std::fill(ends + rows.begin, ends + rows.end, uint8_t{0});
      text.set_ends(rows, ends, [&](int64_t row) { return text.chunk_end(row, rows.end - 1); });
    }
  });
}

}  // namespace bytekernels
