// A chunk at a time: its probabilities in the order of the strings, up to one factor, and for each row the sums over
// its children's intervals. On the way down a string these add up fewer and fewer tokens, so no running sum over all is
// needed, and sums of non-negative numbers alone keep the relative precision of the rarest branch.
#include "marginals.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/arena.h"
#include "cpu/simd.h"
#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 1 << 13;  // logits worth a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The rows of each chunk: those of chunk m are rows[starts[m]] to rows[starts[m + 1]], in order.
struct ByChunk {
  std::vector<int64_t> starts;
  std::vector<int64_t> rows;
};

bool has_distribution(const MarginalRows& rows, int64_t row) {
  return rows.chunk_of[row] >= 0 && rows.prefix[row] >= 0;
}

ByChunk by_chunk(const MarginalRows& rows, int64_t chunks) {
  ByChunk sorted{std::vector<int64_t>(chunks + 1), {}};
  for (int64_t row = 0; row < rows.total; ++row) {
    if (has_distribution(rows, row)) ++sorted.starts[rows.chunk_of[row] + 1];
  }
  for (int64_t m = 0; m < chunks; ++m) sorted.starts[m + 1] += sorted.starts[m];
  sorted.rows.resize(sorted.starts[chunks]);
  std::vector<int64_t> next(sorted.starts.begin(), sorted.starts.end() - 1);
  for (int64_t row = 0; row < rows.total; ++row) {
    if (has_distribution(rows, row)) sorted.rows[next[rows.chunk_of[row]]++] = row;
  }
  return sorted;
}

// One thread's working memory: the weights of a chunk's tokens, in the order of their strings.
class Weights {
 public:
  explicit Weights(const SortedVocabulary& vocabulary)
      : vocabulary_(vocabulary),
        padded_(round_up(vocabulary.tokens, kLanes)),
        arena_(padded_),
        weights_(arena_.take(padded_)) {}

  template <class E>
  void read(const E* logits) {
    const int64_t tokens = vocabulary_.tokens;
    for (int64_t i = 0; i < tokens; ++i) weights_[i] = to_float(logits[vocabulary_.order[i]]);
    std::fill(weights_ + tokens, weights_ + padded_, -kInfinity);
    const float best = greatest(weights_, tokens);
    for (int64_t i = 0; i < padded_; i += kLanes) store(weights_ + i, exp_of_nonpositive(load(weights_ + i) - best));
  }

  // Writes the log-probabilities after the string of a node.
  void write(int64_t node, float* out) const {
    std::array<double, kOutcomes> sums{};
    double total = 0;
    const Range children = vocabulary_.trie.children_of(node);
    for (int64_t child = children.begin; child < children.end; ++child) {
      const int32_t* const span = vocabulary_.spans + 3 * child;
      const int32_t byte = vocabulary_.trie.edges[child] & 255;
      sums[byte] = sum(span[1], span[2]);
      sums[256 + byte] = sum(span[0], span[1]);
      total += sums[byte] + sums[256 + byte];
    }
    const double log_total = std::log(total);
    for (int64_t i = 0; i < kOutcomes; ++i) {
      out[i] = sums[i] > 0 ? static_cast<float>(std::log(sums[i]) - log_total) : -kInfinity;
    }
  }

 private:
  double sum(int64_t begin, int64_t end) const {
    WideVec lanes{};
    for (; begin + kWideLanes <= end; begin += kWideLanes) {
      HalfFloats values;
      std::memcpy(&values, weights_ + begin, sizeof values);
      lanes += __builtin_convertvector(values, WideVec);
    }
    double total = 0;
    for (int lane = 0; lane < kWideLanes; ++lane) total += lanes[lane];
    for (; begin < end; ++begin) total += weights_[begin];
    return total;
  }

  const SortedVocabulary& vocabulary_;
  int64_t padded_;
  Arena arena_;
  float* weights_;
};

}  // namespace

template <class E>
void byte_marginals(const Rows<const E>& logits, int64_t chunks, const SortedVocabulary& vocabulary,
                    const MarginalRows& rows, float* out, int threads) {
  parallel_for(rows.total, kGrain / kOutcomes, threads, [&](Range share) {
    for (int64_t row = share.begin; row < share.end; ++row) {
      if (!has_distribution(rows, row)) std::fill_n(out + row * kOutcomes, kOutcomes, -kInfinity);
    }
  });
  const ByChunk sorted = by_chunk(rows, chunks);
  parallel_for(chunks, kGrain / std::max<int64_t>(vocabulary.tokens, 1) + 1, threads, [&](Range share) {
    Weights weights(vocabulary);
    for (int64_t m = share.begin; m < share.end; ++m) {
      if (sorted.starts[m] == sorted.starts[m + 1]) continue;
      weights.read(logits[m]);
      for (int64_t i = sorted.starts[m]; i < sorted.starts[m + 1]; ++i) {
        const int64_t row = sorted.rows[i];
        weights.write(rows.prefix[row], out + row * kOutcomes);
      }
    }
  });
}

template void byte_marginals(const Rows<const float>&, int64_t, const SortedVocabulary&, const MarginalRows&, float*,
                             int);
template void byte_marginals(const Rows<const bf16>&, int64_t, const SortedVocabulary&, const MarginalRows&, float*,
                             int);

}  // namespace bytekernels
