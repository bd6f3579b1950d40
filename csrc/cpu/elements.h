// Vectors straight from and to rows of float or bf16 elements, whatever the address, and past the caches.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace bytekernels {

using HalfVec = uint16_t __attribute__((vector_size(kVectorBytes / 2), may_alias));

// kLanes elements from any address.
inline Vec load_elements(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Vec load_elements(const bf16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Vec>(__builtin_convertvector(half, BitsVec) << 16);
}

// from_float<bf16> of each lane.
inline HalfVec narrowed(Vec value) {
  const BitsVec bits = reinterpret_cast<BitsVec>(value);
  const BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsVec nan = 0x7fc0 - BitsVec{};
  return __builtin_convertvector(value != value ? nan : rounded, HalfVec);
}

// kLanes elements to any address.
inline void store_elements(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline void store_elements(bf16* to, Vec value) {
  const HalfVec half = narrowed(value);
  std::memcpy(to, &half, sizeof half);
}

// kLanes elements to memory without fetching its old contents, at an address aligned to all of them. What other
// threads are to read needs end_stream() after it.
inline void stream_elements(float* to, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif defined(__AVX__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#elif defined(__SSE2__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(value));
#else
  store(to, value);
#endif
}

inline void stream_elements(bf16* to, Vec value) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(narrowed(value)));
#elif defined(__AVX__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(narrowed(value)));
#else
  store_elements(to, value);
#endif
}

inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Whether an output of contiguous rows is better streamed: it is larger than a cache, and its rows are whole aligned
// vectors.
inline bool worth_streaming(const void* data, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLarge = int64_t{16} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && row_bytes % kVectorBytes == 0;
  return aligned && rows * row_bytes >= kLarge;
}

// The fewest rows worth a thread, of so many bytes each that are read and written.
inline int64_t grain_of(int64_t row_bytes) { return (1 << 16) / std::max<int64_t>(row_bytes, 1) + 1; }

// A whole vector's elements in a row.
struct Whole {
  bool streamed;

  template <class E>
  Vec load(const E* from) const {
    return load_elements(from);
  }

  template <class E>
  void store(E* to, Vec value) const {
    if (streamed) {
      stream_elements(to, value);
    } else {
      store_elements(to, value);
    }
  }
};

// The last `count` elements of a row, fewer than kLanes. Lanes past them are read as zeros and not written.
struct Rest {
  int64_t count;

  template <class E>
  Vec load(const E* from) const {
    E elements[kLanes] = {};
    std::memcpy(elements, from, count * sizeof(E));
    return load_elements(elements);
  }

  template <class E>
  void store(E* to, Vec value) const {
    E elements[kLanes];
    store_elements(elements, value);
    std::memcpy(to, elements, count * sizeof(E));
  }
};

// Calls body(i, part) for the elements of a row from i on that go in one vector; part loads and stores them.
template <class Body>
inline void across(int64_t width, bool streamed, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, Whole{streamed});
  if (i < width) body(i, Rest{width - i});
}

template <class E>
inline void fill_row(E* to, int64_t width, float value, bool streamed) {
  across(width, streamed, [&](int64_t i, auto part) { part.store(to + i, broadcast(value)); });
}

}  // namespace bytekernels
