#include "pack.h"

#include <algorithm>

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {

void row_index(const int32_t* cu, int64_t sequences, int32_t* sequence, int32_t* position, int threads) {
  parallel_for(cu[sequences], grain_of(2 * sizeof(int32_t)), threads, [&](Range share) {
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      std::fill(sequence + rows.begin, sequence + rows.end, static_cast<int32_t>(s));
      for (int64_t t = rows.begin; t < rows.end; ++t) position[t] = static_cast<int32_t>(t - cu[s]);
    });
  });
}

}  // namespace bytekernels
