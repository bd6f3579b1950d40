#include "cuda/pack.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const PackKernel&, const Grid&, const Where&);

}  // namespace bytekernels
