// Vectors of the widest kind that the target has, and the elementary functions the loops need, accurate to an ulp or
// two of float32. Everything is written with the compiler's vector extensions, so that any target compiles it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace bytekernels {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kWideLanes = kVectorBytes / sizeof(double);

using Vec = float __attribute__((vector_size(kVectorBytes), may_alias));
using IntVec = int32_t __attribute__((vector_size(kVectorBytes), may_alias));
using BitsVec = uint32_t __attribute__((vector_size(kVectorBytes), may_alias));

using WideVec = double __attribute__((vector_size(kVectorBytes), may_alias));
using WideBitsVec = uint64_t __attribute__((vector_size(kVectorBytes), may_alias));
using HalfFloats = float __attribute__((vector_size(kVectorBytes / 2), may_alias));  // as many as a WideVec has lanes

// Loads and stores of kLanes floats at an address aligned to a whole vector.
inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// The lanes' numbers, 0 to kLanes - 1.
inline IntVec lane_numbers() {
  IntVec lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// exp(x) for x <= 0, zero where the result would not be a normal number; NaN for NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2, and exp(r) by its series: the first term left out, r^8 / 8!, is below 6e-9.
inline Vec exp_of_nonpositive(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec shifted = x * kLog2e + kShift;
  const Vec n = shifted - kShift;
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec series = r * (1.0f / 5040) + (1.0f / 720);
  series = series * r + (1.0f / 120);
  series = series * r + (1.0f / 24);
  series = series * r + (1.0f / 6);
  series = series * r + 0.5f;
  series = series * (r * r) + r;
  // n << 23, as kShift's own low bits are zero; modulo 2^32, which only an x whose result is zero needs.
  const BitsVec power = reinterpret_cast<BitsVec>(shifted) << 23;
  const Vec scale = reinterpret_cast<Vec>(power + (127U << 23));
  return x < -87.0f ? Vec{} : scale + scale * series;
}

// The same of float64, within an ulp: the first term left out, r^14 / 14!, is below 5e-18.
inline WideVec exp_of_nonpositive(WideVec x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  const WideVec shifted = x * kLog2e + kShift;
  const WideVec n = shifted - kShift;
  const WideVec r = (x - n * kLn2High) - n * kLn2Low;
  WideVec series = r * (1.0 / 6227020800) + (1.0 / 479001600);
  for (const double term : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                            1.0 / 24, 1.0 / 6, 1.0 / 2}) {
    series = series * r + term;
  }
  series = series * (r * r) + r;
  const WideBitsVec power = reinterpret_cast<WideBitsVec>(shifted) << 52;
  const WideVec scale = reinterpret_cast<WideVec>(power + (1023ULL << 52));
  return x < -708.0 ? WideVec{} : scale + scale * series;
}

// log(1 + u) for 0 <= u <= 1, by 2 artanh(s) with s = u / (2 + u) <= 1/3; the first term left out is below 2e-8.
inline Vec log1p_of_fraction(Vec u) {
  const Vec s = u / (2.0f + u);
  const Vec square = s * s;
  Vec series = square * (1.0f / 13) + (1.0f / 11);
  series = series * square + (1.0f / 9);
  series = series * square + (1.0f / 7);
  series = series * square + (1.0f / 5);
  series = series * square + (1.0f / 3);
  return 2.0f * (s + s * (series * square));
}

// log(1 + exp(x)), with full relative precision for very negative x too.
inline Vec softplus(Vec x) { return maximum(x, Vec{}) + log1p_of_fraction(exp_of_nonpositive(x > 0.0f ? -x : x)); }

// 1 / (1 + exp(-x)).
inline Vec sigmoid(Vec x) {
  const Vec power = exp_of_nonpositive(x > 0.0f ? -x : x);
  return (x > 0.0f ? broadcast(1.0f) : power) / (1.0f + power);
}

// bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class E>
E from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

// Row of n elements to floats, zeros from n up to `padded`.
template <class E>
inline void load_row(const E* from, int64_t n, int64_t padded, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
  for (int64_t i = n; i < padded; ++i) to[i] = 0;
}

template <class E>
inline void store_row(const float* from, int64_t n, E* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<E>(from[i]);
}

namespace detail {

// Lanes of (a, b) with index bit D kept apart: the two halves of one exchange in a transposition.
template <int D, int... J>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(a, b, (J & D ? kLanes + J - D : J)...);
  const Vec high = __builtin_shufflevector(a, b, (J & D ? kLanes + J : J + D)...);
#else
  const Vec low = __builtin_shuffle(a, b, IntVec{(J & D ? kLanes + J - D : J)...});
  const Vec high = __builtin_shuffle(a, b, IntVec{(J & D ? kLanes + J : J + D)...});
#endif
  a = low;
  b = high;
}

// Exchanges that bit of the row number with that bit of the lane number, then the higher ones.
template <int D>
inline void exchange_bits(Vec* rows) {
  if constexpr (D < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes>());
    }
    exchange_bits<2 * D>(rows);
  }
}

// Adds to each lane the one whose number differs in bit D, then the higher bits.
template <int D, int... J>
inline Vec add_lanes(Vec value, std::integer_sequence<int, J...> lanes) {
  if constexpr (D < kLanes) {
#if defined(__clang__)
    const Vec other = __builtin_shufflevector(value, value, (J ^ D)...);
#else
    const Vec other = __builtin_shuffle(value, IntVec{(J ^ D)...});
#endif
    return add_lanes<2 * D>(value + other, lanes);
  } else {
    return value;
  }
}

}  // namespace detail

inline float sum_of_lanes(Vec value) {
  return detail::add_lanes<1>(value, std::make_integer_sequence<int, kLanes>())[0];
}

// The greatest of n values; NaN where one of them is.
inline float greatest(const float* values, int64_t n) {
  Vec best = broadcast(-std::numeric_limits<float>::infinity());
  IntVec unordered{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec value;
    std::memcpy(&value, values + i, sizeof value);
    best = maximum(value, best);
    unordered |= value != value;
  }
  float most = -std::numeric_limits<float>::infinity();
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = std::max(most, best[lane]);
    nan |= unordered[lane] != 0;
  }
  for (; i < n; ++i) {
    most = std::max(most, values[i]);
    nan |= values[i] != values[i];
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : most;
}

// Sum of a[i] b[i] over n floats, a multiple of kLanes.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum{};
  for (int64_t i = 0; i < n; i += kLanes) sum += load(a + i) * load(b + i);
  return sum_of_lanes(sum);
}

// to[j][i] = from[i][j] for i < rows and j < columns, both multiples of kLanes; aligned, with the given row strides.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(from + (i + r) * from_stride + j);
      detail::exchange_bits<1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_stride + i, block[r]);
    }
  }
}

}  // namespace bytekernels
