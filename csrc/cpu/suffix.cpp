#include "suffix.h"

#include <algorithm>
#include <array>

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 512;  // walks worth a thread

// The root's children by byte, -1 where there is none.
std::array<int32_t, 256> below_root(const Trie& trie) {
  std::array<int32_t, 256> nodes;
  nodes.fill(-1);
  const Range children = trie.children_of(0);
  for (int64_t node = children.begin; node < children.end; ++node) {
    nodes[trie.edges[node] & 255] = static_cast<int32_t>(node);
  }
  return nodes;
}

}  // namespace

void longest_suffix(const StringTrie& suffixes, const uint8_t* ids, const int32_t* cu, int64_t sequences,
                    const int32_t* rows, int64_t count, int32_t* found, int threads) {
  const std::array<int32_t, 256> first = below_root(suffixes.trie);
  auto ending_at = [&](int64_t row, int64_t start) {
    return longest_below(suffixes, first[ids[row]], row + 1 - start, [&](int64_t depth) { return ids[row - depth]; });
  };
  parallel_for(count, kGrain, threads, [&](Range share) {
    if (rows) {
      for (int64_t i = share.begin; i < share.end; ++i) {
        found[i] = ending_at(rows[i], cu[sequence_of(cu, sequences, rows[i])]);
      }
    } else {
      for_each_piece(cu, sequences, share, [&](int64_t s, Range piece) {
        for (int64_t row = piece.begin; row < piece.end; ++row) found[row] = ending_at(row, cu[s]);
      });
    }
  });
}

void longest_suffix_step(const StringTrie& suffixes, const uint8_t* ids, const uint8_t* active, const SuffixRing& ring,
                         int32_t* found, int threads) {
  const std::array<int32_t, 256> first = below_root(suffixes.trie);
  parallel_for(ring.sequences, kGrain, threads, [&](Range share) {
    for (int64_t s = share.begin; s < share.end; ++s) {
      found[s] = active && !active[s] ? -1 : ring.take(suffixes, s, ids[s], first[ids[s]]);
    }
  });
}

}  // namespace bytekernels
