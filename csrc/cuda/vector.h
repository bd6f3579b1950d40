// 16 bytes at a time, at any address, on the device and on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "ragged.h"

namespace bytekernels {

// 16 bytes of memory: byte i of it is bits [8 i, 8 i + 8) of `low`, byte 8 + i the same of `high`.
struct alignas(16) Vector {
  static constexpr int64_t kBytes = 16;

  uint64_t low;
  uint64_t high;
};

// A row of bytes that is written in vectors: the aligned 16 bytes that hold byte 0, those after them, and so on. The
// first and the last may lie partly outside.
struct Vectors {
  uint8_t* data;
  int64_t bytes;

  RAGGED_INLINE int64_t skew() const {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % Vector::kBytes);
  }

  RAGGED_INLINE int64_t count() const {
    return bytes == 0 ? 0 : (skew() + bytes + Vector::kBytes - 1) / Vector::kBytes;
  }

  // Where vector `i` begins: the first at 0 or before.
  RAGGED_INLINE int64_t begin(int64_t i) const { return i * Vector::kBytes - skew(); }

  // The part of vector `i` that lies inside.
  RAGGED_INLINE Range inside(int64_t i) const {
    const int64_t from = begin(i);
    const int64_t to = from + Vector::kBytes;
    return {from < 0 ? 0 : from, to < bytes ? to : bytes};
  }
};

// The vector whose every byte is `byte`.
RAGGED_INLINE Vector splat(uint8_t byte) {
  const uint64_t word = 0x0101010101010101ULL * byte;
  return {word, word};
}

// The lowest `count` bytes of a word.
RAGGED_INLINE uint64_t low_bytes(int64_t count) {
  if (count <= 0) return 0;
  return count >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * count)) - 1;
}

// Bytes [begin, end) of `over`, the others of `under`.
RAGGED_INLINE Vector merge(const Vector& under, const Vector& over, int64_t begin, int64_t end) {
  const uint64_t low = low_bytes(end) & ~low_bytes(begin);
  const uint64_t high = low_bytes(end - 8) & ~low_bytes(begin - 8);
  return {(under.low & ~low) | (over.low & low), (under.high & ~high) | (over.high & high)};
}

RAGGED_INLINE Vector load_aligned(uintptr_t address) {
#ifdef __CUDA_ARCH__
  const ulonglong2 words = __ldg(reinterpret_cast<const ulonglong2*>(address));
  return {words.x, words.y};
#else
  Vector vector;
  std::memcpy(&vector, reinterpret_cast<const uint8_t*>(address), sizeof vector);
  return vector;
#endif
}

// The 16 bytes from `offset` of `bytes` bytes at `source`, which are only read; what lies outside of them is zero and
// not touched. Two aligned loads and shifts, whatever the address.
RAGGED_INLINE Vector load(const uint8_t* source, int64_t bytes, int64_t offset) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(source) + offset;
  const auto skew = static_cast<int64_t>(address % Vector::kBytes);
  if (skew == 0 && offset >= 0 && offset + Vector::kBytes <= bytes) return load_aligned(address);
  if (offset >= skew && offset - skew + 2 * Vector::kBytes <= bytes) {
    const Vector first = load_aligned(address - skew);
    const Vector second = load_aligned(address - skew + Vector::kBytes);
    const bool far = skew >= 8;
    const uint64_t a = far ? first.high : first.low;
    const uint64_t b = far ? second.low : first.high;
    const uint64_t c = far ? second.high : second.low;
    const int64_t bits = 8 * (skew % 8);
    if (bits == 0) return {a, b};
    return {(a >> bits) | (b << (64 - bits)), (b >> bits) | (c << (64 - bits))};
  }
  Vector vector{0, 0};
  for (int64_t i = 0; i < Vector::kBytes; ++i) {
    const int64_t at = offset + i;
    if (at < 0 || at >= bytes) continue;
    const uint64_t byte = source[at];
    if (i < 8) {
      vector.low |= byte << (8 * i);
    } else {
      vector.high |= byte << (8 * (i - 8));
    }
  }
  return vector;
}

// Writes vector `i` of `out`, less what lies outside.
RAGGED_INLINE void store(const Vectors& out, int64_t i, const Vector& vector) {
  const int64_t begin = out.begin(i);
  const Range inside = out.inside(i);
  if (inside.size() == Vector::kBytes) {
#ifdef __CUDA_ARCH__
    *reinterpret_cast<ulonglong2*>(out.data + begin) = make_ulonglong2(vector.low, vector.high);
#else
    std::memcpy(out.data + begin, &vector, sizeof vector);
#endif
    return;
  }
  for (int64_t at = inside.begin; at < inside.end; ++at) {
    const int64_t byte = at - begin;
    out.data[at] = static_cast<uint8_t>(byte < 8 ? vector.low >> (8 * byte) : vector.high >> (8 * (byte - 8)));
  }
}

// Calls serve(s, rows) for each sequence s with bytes in vector `i` of `out`, `rows` being those bytes. `s` comes as a
// sequence that starts at or before them, or -1, and goes as the last one served.
template <class Cu, class Serve>
RAGGED_INLINE void for_sequences_in(const Vectors& out, int64_t i, const Cu& cu, int64_t sequences, int64_t& s,
                                    const Serve& serve) {
  const Range inside = out.inside(i);
  int64_t begin = inside.begin;
  s = sequence_of(cu, sequences, begin, s);
  while (true) {
    const int64_t next = s + 1 < sequences ? cu[s + 1] : out.bytes;
    const int64_t end = next < inside.end ? next : inside.end;
    if (end > begin) {
      serve(s, Range{begin, end});
      begin = end;
    }
    if (begin >= inside.end || s + 1 >= sequences) return;
    ++s;
  }
}

}  // namespace bytekernels
