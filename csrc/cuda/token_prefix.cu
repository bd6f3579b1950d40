#include "cuda/token_prefix.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const TokenPrefixKernel&, const Grid&, const Where&);

}  // namespace bytekernels
