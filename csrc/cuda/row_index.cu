#include "cuda/row_index.h"

#include "cuda/launch.cuh"

namespace bytekernels {

template void launch(const RowIndexKernel&, const Grid&, const Where&);

}  // namespace bytekernels
