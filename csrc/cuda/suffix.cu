#include "cuda/suffix.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const SuffixKernel&, const Grid&, const Where&);

}  // namespace bytekernels
