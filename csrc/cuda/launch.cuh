// The one kernel: a grid of threads that run a body (launch.h).
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"

namespace bytekernels {

template <class Body>
__global__ void __launch_bounds__(Grid::kThreads)
    grid_kernel(const __grid_constant__ Body body, const __grid_constant__ Grid grid) {
  int64_t s = -1;
  for (int64_t item = grid.first(blockIdx.x, threadIdx.x); item < grid.items; item = grid.next(item)) body(item, s);
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

template <class Body>
void launch(const Body& body, const Grid& grid, const Where& where) {
  const OnDevice on(where.device);
  const auto stream = reinterpret_cast<cudaStream_t>(where.stream);
  grid_kernel<<<static_cast<unsigned>(grid.blocks), static_cast<unsigned>(Grid::kThreads), 0, stream>>>(body, grid);
  check(cudaGetLastError(), "launch");
}

}  // namespace bytekernels
