// Aligned working memory for one thread of an op.
#pragma once

#include <memory>
#include <new>

#include "simd.h"

namespace bytekernels {

// Floats handed out piece by piece, each piece aligned to a vector, and given back all at once.
class Arena {
 public:
  explicit Arena(int64_t floats)
      : memory_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{kVectorBytes}))),
        next_(memory_.get()),
        end_(next_ + floats) {}

  float* take(int64_t floats) {
    float* piece = next_;
    next_ += round_up(floats, kLanes);
    if (next_ > end_) throw std::bad_alloc();
    return piece;
  }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{kVectorBytes}); }
  };
  std::unique_ptr<float, Free> memory_;
  float* next_;
  float* end_;
};

}  // namespace bytekernels
