// dechunk in shares of bytes: each byte's row is z of its chunk, null, or NaN, and the residual on it.
#include "../dechunk.h"

#include <limits>
#include <vector>

#include "../parallel.h"
#include "arena.h"
#include "ema.h"

namespace bytekernels {
namespace {

// z of one chunk after the other.
template <class E>
class Walker {
 public:
  Walker(const DechunkShape& shape, Rows<const E> chunks, const float* weight)
      : shape_(shape),
        chunks_(chunks),
        ema_(weight, shape.width),
        arena_(round_up(shape.width, kLanes)),
        z_(arena_.take(shape.width)) {}

  // z [width] of chunk m < held().
  const float* at(int64_t m) {
    if (m != next_ - 1) advance(m);
    return z_;
  }

 private:
  void advance(int64_t m) {
    if (m < sequence_.begin || m >= sequence_.end) {
      sequence_ = shape_.sequence(m);
      next_ = -1;
    }
    if (m != next_) {
      int64_t from = Ema::tile_of(sequence_, m);
      if (from > sequence_.begin) ema_.before_tile(chunks_, sequence_, from, z_);
      for (; from < m; ++from) ema_.step(chunks_, sequence_, from, z_, z_);
    } else if (m == Ema::tile_of(sequence_, m) && ema_.reaching(sequence_, m) >= 0) {
      ema_.before_tile(chunks_, sequence_, m, z_);
    }
    ema_.step(chunks_, sequence_, m, z_, z_);
    next_ = m + 1;
  }

  const DechunkShape& shape_;
  Rows<const E> chunks_;
  Ema ema_;
  Arena arena_;
  float* z_;
  Range sequence_{0, 0};
  int64_t next_ = -1;  // the chunk after the one that z_ is of
};

}  // namespace

template <class E, class R>
void dechunk(const DechunkShape& shape, Rows<const E> chunks, const float* weight, const float* null,
             Rows<const R> residual, Wider<E, R>* out, int threads) {
  const int64_t width = shape.width, held = shape.held();
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof *out);
  const bool streamed = worth_streaming(out, shape.rows, row_bytes);
  const std::vector<float> zeros(null ? 0 : width);
  const float* const before = null ? null : zeros.data();
  parallel_for(shape.rows, grain_of(2 * row_bytes), threads, [&](Range share) {
    Walker<E> walker(shape, chunks, weight);
    for (int64_t t = share.begin; t < share.end; ++t) {
      Wider<E, R>* const to = out + t * width;
      auto write = [&](const auto* u) {
        const R* const other = residual.data ? residual[t] : nullptr;
        across(width, streamed, [&](int64_t i, auto part) {
          const Vec value = part.load(u + i);
          part.store(to + i, other ? value + part.load(other + i) : value);
        });
      };
      const int64_t m = shape.chunk_of[t];
      if (m < 0) {
        write(before);
      } else if (m >= held) {
        fill_row(to, width, std::numeric_limits<float>::quiet_NaN(), streamed);
      } else if (weight) {
        write(walker.at(m));
      } else {
        write(chunks[m]);
      }
    }
    end_stream();
  });
}

template void dechunk(const DechunkShape&, Rows<const float>, const float*, const float*, Rows<const float>, float*,
                      int);
template void dechunk(const DechunkShape&, Rows<const float>, const float*, const float*, Rows<const bf16>, float*,
                      int);
template void dechunk(const DechunkShape&, Rows<const bf16>, const float*, const float*, Rows<const float>, float*,
                      int);
template void dechunk(const DechunkShape&, Rows<const bf16>, const float*, const float*, Rows<const bf16>, bf16*, int);

}  // namespace bytekernels
