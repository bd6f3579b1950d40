// Where a kernel's body runs: on a CUDA device, or on the host, thread after thread, in the order of the grid.
//
// A body is a struct of arguments with `items()` and `operator()(item, s)`, which serves one item; `s`, -1 at first, is
// what the same thread left there at its last item. It shares nothing with other threads, so the host's loop computes
// what a device would: that is how CUDA code is tested where there is no GPU.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "ragged.h"

namespace bytekernels {

struct Where {
  int device;        // -1 for the host
  uintptr_t stream;  // a cudaStream_t
};

// Queues the body on the stream and returns at once. Defined and instantiated in cuda/*.cu.
template <class Body>
void launch(const Body& body, const Grid& grid, const Where& where);

template <class Body>
void run_on_grid(const Body& body, const Where& where) {
  const Grid grid = Grid::over(body.items());
  if (grid.blocks == 0) return;
  if (where.device >= 0) {
#ifdef BYTEKERNELS_HAS_CUDA
    launch(body, grid, where);
    return;
#else
    throw std::runtime_error("bytekernels._C was built without CUDA: bytekernels._C.cuda_refusal says why");
#endif
  }
  for (int64_t block = 0; block < grid.blocks; ++block) {
    for (int64_t thread = 0; thread < Grid::kThreads; ++thread) {
      int64_t s = -1;
      for (int64_t item = grid.first(block, thread); item < grid.items; item = grid.next(item)) body(item, s);
    }
  }
}

}  // namespace bytekernels
