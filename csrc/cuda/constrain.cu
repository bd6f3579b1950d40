#include "cuda/constrain.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const ConstrainKernel&, const Grid&, const Where&);

}  // namespace bytekernels
