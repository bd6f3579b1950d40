#include "pack.h"

#include <algorithm>

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {

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

}  // namespace bytekernels
