#include "cuda/suffix_step.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const SuffixStepKernel&, const Grid&, const Where&);

}  // namespace bytekernels
