#include "cuda/targets.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const TargetsKernel&, const Grid&, const Where&);

}  // namespace bytekernels
