// What the pack ops' CPU loops share: shares of rows cut at sequences, and copies that suit where they go.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "ragged.h"

namespace bytekernels {

constexpr int64_t kGrainBytes = 64 * 1024;  // less than this is copied sooner than a thread wakes

inline int64_t grain_of(int64_t row_bytes) {
  return std::max<int64_t>(kGrainBytes / std::max<int64_t>(row_bytes, 1), 1);
}

// Calls piece(s, rows) for each sequence s with rows among `share`, in order, `rows` being the part that is.
template <class Piece>
void for_each_piece(const int32_t* cu, int64_t sequences, Range share, Piece&& piece) {
  int64_t row = share.begin;
  for (int64_t s = sequence_of(cu, sequences, row); row < share.end; ++s) {
    const int64_t end = std::min<int64_t>(cu[s + 1], share.end);
    if (end > row) piece(s, Range{row, end});
    row = end;
  }
}

// Copies into an output. One larger than the caches is written past them: ordinary stores would first read the lines
// that they overwrite, a third of all traffic.
class Copy {
 public:
  explicit Copy(int64_t output_bytes) : past_caches_(output_bytes >= kPastCaches) {}
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  // Each thread has its own, and what it wrote is there for others once it is gone.
  ~Copy() {
#if defined(__AVX__)
    if (past_caches_) _mm_sfence();
#endif
  }

  void operator()(uint8_t* to, const uint8_t* from, int64_t bytes) const {
    if (bytes == 0) return;
#if defined(__AVX__)
    if (past_caches_ && bytes >= 4 * kLine) {
      const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
      std::memcpy(to, from, head);
      int64_t i = head;
      for (; i + kLine <= bytes; i += kLine) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + kLine / 2));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + kLine / 2), high);
      }
      to += i;
      from += i;
      bytes -= i;
      if (bytes == 0) return;
    }
#endif
    std::memcpy(to, from, bytes);
  }

 private:
  static constexpr int64_t kPastCaches = int64_t{32} << 20;
  static constexpr int64_t kLine = 64;

  bool past_caches_;
};

}  // namespace bytekernels
