// Routing in shares of rows. With the pair (a, b) = (q[t], k[t+1]) or (q[t-1], k[t]), la and lb their inverse norms:
//   cos = la lb <a, b>,   da = dcos la (lb b - cos la a),   db = dcos lb (la a - cos lb b).
// Counts are whole numbers and rows stand alone, so that the number of shares changes nothing.
#include "route.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "../ragged.h"
#include "elements.h"

namespace bytekernels {
namespace {

constexpr float kEps = 1e-12f;               // added to squared norms
constexpr int64_t kFlagsPerShare = 1 << 14;  // the fewest boundaries worth a thread

struct Pair {
  float cosine;
  float inverse_a;
  float inverse_b;
};

template <class E>
Pair compare(const E* a, const E* b, int64_t width) {
  Vec aa{}, bb{}, ab{};
  across(width, false, [&](int64_t i, auto part) {
    const Vec left = part.load(a + i), right = part.load(b + i);
    aa += left * left;
    bb += right * right;
    ab += left * right;
  });
  const float inverse_a = 1 / std::sqrt(sum_of_lanes(aa) + kEps);
  const float inverse_b = 1 / std::sqrt(sum_of_lanes(bb) + kEps);
  return {sum_of_lanes(ab) * inverse_a * inverse_b, inverse_a, inverse_b};
}

// Calls body(first, last, rows) for each sequence, rows first to last, with those of its rows that lie in the range.
template <class Body>
void for_each_sequence(const RouteShape& shape, Range range, Body&& body) {
  if (range.size() == 0) return;
  for (int64_t s = sequence_of(shape.cu, shape.sequences, range.begin); s < shape.sequences; ++s) {
    const int64_t begin = shape.cu[s], end = shape.cu[s + 1];
    if (begin >= range.end) break;
    if (begin < end) body(begin, end - 1, Range{std::max(begin, range.begin), std::min(end, range.end)});
  }
}

// The layout of the rows of one share, after `newest` + 1 chunks.
void lay_out(const RouteShape& shape, const uint8_t* boundary, Range range, int64_t newest, const Layout& layout) {
  for_each_sequence(shape, range, [&](int64_t first, int64_t, Range rows) {
    bool begun = std::memchr(boundary + first, 1, rows.begin - first) != nullptr;  // a chunk in an earlier share
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      if (boundary[t]) {
        begun = true;
        if (++newest < layout.room) layout.index[newest] = static_cast<int32_t>(t);
      }
      layout.chunk_of[t] = begun ? static_cast<int32_t>(newest) : -1;
    }
  });
}

// Calls count(rows), the number of boundaries among them, for each share, then lays out the chunks.
template <class Count>
int64_t lay_out_shares(const RouteShape& shape, int64_t grain, const uint8_t* boundary, const Layout& layout,
                       int threads, Count&& count) {
  const int shares = shares_for(shape.rows, grain, threads);
  std::vector<int64_t> before(shares + 1);  // boundaries before each share
  parallel_shares(shares, [&](int share) { before[share + 1] = count(share_of(shape.rows, shares, share)); });
  std::partial_sum(before.begin(), before.end(), before.begin());
  parallel_shares(shares, [&](int share) {
    const Range rows = share_of(shape.rows, shares, share);
    lay_out(shape, boundary, rows, before[share] - 1, layout);
    // Offsets of the sequences that start in the share; the last share has the end too.
    int64_t row = rows.begin, chunks = before[share];
    for (int64_t s = first_starting_at(shape.cu, shape.sequences, row); s <= shape.sequences; ++s) {
      const int64_t start = shape.cu[s];
      if (start >= rows.end && share + 1 < shares) break;
      chunks += std::count(boundary + row, boundary + start, 1);
      row = start;
      layout.cu_chunks[s] = static_cast<int32_t>(chunks);
    }
  });
  const int64_t chunks = before[shares];
  if (chunks < layout.room) std::fill(layout.index + chunks, layout.index + layout.room, -1);
  return chunks;
}

// A row of `bytes` bytes; streamed, they are whole aligned vectors.
void copy_row(const uint8_t* from, uint8_t* to, int64_t bytes, bool streamed) {
  if (!streamed) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += kVectorBytes) {
    Vec value;
    std::memcpy(&value, from + i, sizeof value);
    stream_elements(reinterpret_cast<float*>(to + i), value);
  }
}

void clear_row(uint8_t* to, int64_t bytes, bool streamed) {
  if (!streamed) {
    std::memset(to, 0, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += kVectorBytes) stream_elements(reinterpret_cast<float*>(to + i), Vec{});
}

}  // namespace

int64_t chunk_layout(const RouteShape& shape, const uint8_t* boundary, const Layout& layout, int threads) {
  return lay_out_shares(shape, kFlagsPerShare, boundary, layout, threads,
                        [&](Range rows) { return std::count(boundary + rows.begin, boundary + rows.end, 1); });
}

template <class E>
int64_t route(const RouteShape& shape, int64_t width, bool lookahead, Rows<const E> q, Rows<const E> k,
              const uint8_t* required, float* prob, uint8_t* boundary, const Layout& layout, int threads) {
  const int64_t to_q = lookahead ? 0 : -1, to_k = lookahead ? 1 : 0;
  const int64_t grain = grain_of(2 * width * static_cast<int64_t>(sizeof(E)));
  return lay_out_shares(shape, grain, boundary, layout, threads, [&](Range share) {
    int64_t count = 0;
    for_each_sequence(shape, share, [&](int64_t first, int64_t last, Range rows) {
      const int64_t forced = lookahead ? last : first;
      for (int64_t t = rows.begin; t < rows.end; ++t) {
        const float p = t == forced ? 1.0f : (1 - compare(q[t + to_q], k[t + to_k], width).cosine) / 2;
        prob[t] = p < 0 ? 0 : p > 1 ? 1 : p;
        boundary[t] = prob[t] >= 0.5f || (required && required[t]);
        count += boundary[t];
      }
    });
    return count;
  });
}

template <class E>
void route_backward(const RouteShape& shape, int64_t width, bool lookahead, const float* dprob, Rows<const E> q,
                    Rows<const E> k, E* dq, E* dk, int threads) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(E));
  const bool streamed = worth_streaming(dq, shape.rows, row_bytes) && worth_streaming(dk, shape.rows, row_bytes);
  parallel_for(shape.rows, grain_of(4 * row_bytes), threads, [&](Range share) {
    for_each_sequence(shape, share, [&](int64_t first, int64_t last, Range rows) {
      if (rows.begin == first) fill_row(dk + first * width, width, 0, streamed);
      for (int64_t t = rows.begin; t < rows.end; ++t) {  // the pair of q[t] and k[t + 1]
        E *const da = dq + t * width, *const db = dk + (t + 1) * width;
        if (t == last) {
          fill_row(da, width, 0, streamed);
          continue;
        }
        const E *const a = q[t], *const b = k[t + 1];
        const Pair pair = compare(a, b, width);
        const float dcosine = std::abs(pair.cosine) > 1 ? 0 : dprob[lookahead ? t : t + 1] / -2;
        const float across_pair = dcosine * pair.inverse_a * pair.inverse_b;
        const float along_a = dcosine * pair.cosine * pair.inverse_a * pair.inverse_a;
        const float along_b = dcosine * pair.cosine * pair.inverse_b * pair.inverse_b;
        across(width, streamed, [&](int64_t i, auto part) {
          const Vec left = part.load(a + i), right = part.load(b + i);
          part.store(da + i, across_pair * right - along_a * left);
          part.store(db + i, across_pair * left - along_b * right);
        });
      }
    });
    end_stream();
  });
}

void gather_chunks(const int32_t* index, int64_t count, int64_t row_bytes, Rows<const uint8_t> h, uint8_t* out,
                   int threads) {
  const bool streamed = worth_streaming(out, count, row_bytes);
  parallel_for(count, grain_of(2 * row_bytes), threads, [&](Range share) {
    for (int64_t m = share.begin; m < share.end; ++m) {
      uint8_t* const to = out + m * row_bytes;
      if (index[m] < 0) {
        clear_row(to, row_bytes, streamed);
      } else {
        copy_row(h[index[m]], to, row_bytes, streamed);
      }
    }
    end_stream();
  });
}

void gather_chunks_backward(const int32_t* index, int64_t count, const int32_t* chunk_of, int64_t rows,
                            int64_t row_bytes, const uint8_t* de, uint8_t* dh, int threads) {
  const bool streamed = worth_streaming(dh, rows, row_bytes);
  parallel_for(rows, grain_of(row_bytes), threads, [&](Range share) {
    for (int64_t t = share.begin; t < share.end; ++t) {
      const int64_t m = chunk_of[t];
      if (m >= 0 && m < count && index[m] == t) {
        copy_row(de + m * row_bytes, dh + t * row_bytes, row_bytes, streamed);
      } else {
        clear_row(dh + t * row_bytes, row_bytes, streamed);
      }
    }
    end_stream();
  });
}

template int64_t route(const RouteShape&, int64_t, bool, Rows<const float>, Rows<const float>, const uint8_t*, float*,
                       uint8_t*, const Layout&, int);
template int64_t route(const RouteShape&, int64_t, bool, Rows<const bf16>, Rows<const bf16>, const uint8_t*, float*,
                       uint8_t*, const Layout&, int);
template void route_backward(const RouteShape&, int64_t, bool, const float*, Rows<const float>, Rows<const float>,
                             float*, float*, int);
template void route_backward(const RouteShape&, int64_t, bool, const float*, Rows<const bf16>, Rows<const bf16>, bf16*,
                             bf16*, int);

}  // namespace bytekernels
