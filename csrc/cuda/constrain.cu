#include "cuda/constrain.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const ChoicesKernel&, const Grid&, const Where&);
template void launch(const CutKernel&, const Grid&, const Where&);

}  // namespace bytekernels
