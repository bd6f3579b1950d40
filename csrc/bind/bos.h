#pragma once

#include "bindings.h"

namespace bytekernels {

// Refuses what is neither a byte nor kNoBos.
inline void check_bos(int bos) {
  if (bos < kNoBos || bos > 255) refuse("bos must be a byte, or ", kNoBos, " for none, got ", bos);
}

}  // namespace bytekernels
