// A row at a time, in float64: w_i = exp((l_i - greatest) / temperature), the tokens that top_k and top_p keep, and the
// first index at which the running sum of what is kept passes u times all of it.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "simd.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrain = 1 << 13;  // logits worth a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

double uniform(int64_t seed, int64_t counter) {
  const uint64_t z = mix(static_cast<uint64_t>(seed)) + (static_cast<uint64_t>(counter) + 1) * 0x9E3779B97F4A7C15;
  return static_cast<double>(mix(z) >> 11) * 0x1p-53;
}

bool in_unit(float value) { return 0.0f <= value && value <= 1.0f; }

// Rises as the logit falls, then as the index rises.
uint64_t rank_key(float logit, uint32_t index) {
  const float plain = logit + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  const uint32_t rising = bits >> 31 ? ~bits : bits | (1U << 31);
  return static_cast<uint64_t>(~rising) << 32 | index;
}

// One thread's working memory.
class Sampler {
 public:
  explicit Sampler(int64_t vocabulary)
      : vocabulary_(vocabulary),
        weights_(round_up(vocabulary, kWideLanes)),
        sums_(round_up(vocabulary, kWideLanes)),
        keys_(vocabulary) {}

  int64_t draw(const float* logits, double u, float temperature, int32_t top_k, float top_p, float min_p) {
    const float best = greatest(logits, vocabulary_);
    if (!(std::abs(best) < kInfinity && temperature >= 0.0f && temperature < kInfinity && top_k >= 0 &&
          in_unit(top_p) && in_unit(min_p))) {
      return -1;
    }
    if (temperature == 0.0f) return std::find(logits, logits + vocabulary_, best) - logits;
    weigh(logits, best, temperature);
    const bool few = top_k > 0 && top_k < vocabulary_;
    if (few || top_p < 1.0f) {
      const int64_t kept = select(logits, few ? top_k : vocabulary_, top_p);
      std::fill(sums_.begin(), sums_.end(), 0.0);
      for (int64_t i = 0; i < kept; ++i) sums_[index_of(keys_[i])] = weight_of(keys_[i]);
    } else {
      sums_.swap(weights_);
    }
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary_; ++i) {
      sum += sums_[i] >= min_p ? sums_[i] : 0.0;
      sums_[i] = sum;
    }
    // Strictly past, so that a token of no weight is not drawn; u < 1, so that one is past.
    return std::upper_bound(sums_.begin(), sums_.begin() + vocabulary_, u * sum) - sums_.begin();
  }

 private:
  static uint32_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }
  double weight_of(uint64_t key) const { return weights_[index_of(key)]; }

  void weigh(const float* logits, float best, float temperature) {
    const double greatest = best, scale = temperature;
    for (int64_t i = 0; i < vocabulary_; i += kWideLanes) {
      const int64_t count = std::min<int64_t>(vocabulary_ - i, kWideLanes);
      HalfFloats values{};
      std::memcpy(&values, logits + i, count * sizeof(float));
      const WideVec weights = exp_of_nonpositive((__builtin_convertvector(values, WideVec) - greatest) / scale);
      std::memcpy(&weights_[i], &weights, sizeof weights);
    }
  }

  // Puts first in keys_, in no order, those of the `most` likeliest tokens' shortest prefix, in order of falling
  // probability, that reaches top_p. Returns how many they are.
  int64_t select(const float* logits, int64_t most, float top_p) {
    for (int64_t i = 0; i < vocabulary_; ++i) keys_[i] = rank_key(logits[i], static_cast<uint32_t>(i));
    const auto first = keys_.begin();
    if (most < vocabulary_) std::nth_element(first, first + most - 1, keys_.end());
    if (top_p >= 1.0f) return most;

    double total = 0.0;
    for (int64_t i = 0; i < most; ++i) total += weight_of(keys_[i]);
    const double wanted = top_p * total;
    // The rest weighs total - wanted: tokens that together weigh no more than that, and are the least, are in it.
    const double least = (total - wanted) / static_cast<double>(most);
    int64_t end = 0;
    for (int64_t i = 0; i < most; ++i) {
      const uint64_t key = keys_[i];
      keys_[end] = key;
      end += weight_of(key) >= least;
    }
    // The prefix is longer than `begin` and no longer than `end`; the tokens before `begin` weigh `before`.
    int64_t begin = 0;
    double before = 0.0;
    while (end - begin > 1) {
      const int64_t middle = begin + (end - begin) / 2;
      std::nth_element(first + begin, first + middle, first + end);
      double through = before;
      for (int64_t i = begin; i < middle; ++i) through += weight_of(keys_[i]);
      if (through >= wanted) {
        end = middle;
      } else {
        begin = middle;
        before = through;
      }
    }
    return end;
  }

  int64_t vocabulary_;
  std::vector<double> weights_;
  std::vector<double> sums_;
  std::vector<uint64_t> keys_;
};

}  // namespace

void sample(int64_t rows, int64_t vocabulary, const SampleInputs& inputs, int64_t* drawn, int threads) {
  parallel_for(rows, kGrain / vocabulary + 1, threads, [&](Range range) {
    Sampler sampler(vocabulary);
    for (int64_t row = range.begin; row < range.end; ++row) {
      drawn[row] = sampler.draw(inputs.logits + row * vocabulary, uniform(inputs.seeds[row], inputs.counters[row]),
                                inputs.temperature[row], inputs.top_k[row], inputs.top_p[row], inputs.min_p[row]);
    }
  });
}

}  // namespace bytekernels
