#include "cuda/unpack.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const UnpackKernel&, const Grid&, const Where&);

}  // namespace bytekernels
