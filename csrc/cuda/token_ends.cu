#include "cuda/token_ends.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const TokenEndsKernel&, const Grid&, const Where&);

}  // namespace bytekernels
