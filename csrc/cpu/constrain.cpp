#include "constrain.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 2048;  // bytes worth a thread

}  // namespace

void constrain_ends(const ConstrainedText& text, const int32_t* cu, const int32_t* given, int64_t sequences,
                    int64_t total, uint8_t* ends, int threads) {
  const auto choices_of = [&](int64_t row, int64_t stop) { return text.choices_from(row, stop); };
  std::fill(ends, ends + total, uint8_t{0});
  std::vector<double> best(total);
  std::vector<uint8_t> before(total);
  parallel_for(total, kGrain, threads, [&](Range share) {
    const int64_t stop = first_starting_at(cu, sequences, share.end);
    const Cutter<decltype(choices_of)> cutter{text, choices_of, best.data(), before.data(), ends};
    for (int64_t s = first_starting_at(cu, sequences, share.begin); s < stop; ++s) {
      cutter.cut({cu[s], cu[s + 1]}, given[s]);
    }
  });
}

}  // namespace bytekernels
