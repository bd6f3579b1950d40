#include "cpu/pieces.h"
#include "marginals.h"
#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 2048;  // bytes worth a thread

}  // namespace

void token_prefix(const uint8_t* ids, const int32_t* cu, int64_t sequences, const uint8_t* boundary, int64_t total,
                  const Trie& trie, int32_t* prefix, int threads) {
  parallel_for(total, kGrain, threads, [&](Range share) {
    for_each_piece(cu, sequences, share, [&](int64_t s, Range rows) {
      int64_t row = rows.begin;
      while (row > cu[s] && !boundary[row]) --row;  // what the first rows' bytes follow
      int64_t node = -1;
      for (; row < rows.end; ++row) {
        if (boundary[row]) {
          node = 0;
        } else if (node >= 0) {
          node = trie.child(node, ids[row]);
        }
        if (row >= rows.begin) prefix[row] = static_cast<int32_t>(node);
      }
    });
  });
}

}  // namespace bytekernels
