#include "cuda/constrain.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const ChunkEndKernel&, const Grid&, const Where&);
template void launch(const SetEndsKernel&, const Grid&, const Where&);

}  // namespace bytekernels
