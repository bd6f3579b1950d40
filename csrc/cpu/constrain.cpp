#include "constrain.h"

#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 2048;  // bytes worth a thread

}  // namespace

void constrain_ends(const StringTrie& strings, const uint8_t* ids, const int32_t* cu, int64_t sequences, int64_t total,
                    const uint8_t* boundary, uint8_t* ends, int threads) {
  parallel_for(total, kGrain, threads, [&](Range share) {
    const int64_t stop = first_starting_at(cu, sequences, share.end);
    for (int64_t s = first_starting_at(cu, sequences, share.begin); s < stop; ++s) {
      constrain_sequence(strings, ids, boundary, {cu[s], cu[s + 1]}, ends);
    }
  });
}

}  // namespace bytekernels
