// Arguments of longest_suffix and its step that the CPU's and CUDA's bindings have in common.
#pragma once

#include <optional>

#include "../suffix.h"
#include "bind/rows.h"
#include "bind/trie.h"

namespace bytekernels {

inline SuffixRing ring_of(const Array& recent, const Array& counts) {
  const int64_t sequences = elements(counts, sizeof(int32_t), "counts");
  const int64_t bytes = elements(recent, 1, "recent");
  if (sequences == 0 ? bytes != 0 : bytes == 0 || bytes % sequences != 0) {
    refuse("recent must have as many bytes for each of ", sequences, " sequences, at least one, got ", bytes);
  }
  return {pointer<uint8_t>(recent, bytes, "recent"), pointer<int32_t>(counts, sequences, "counts"), sequences,
          sequences == 0 ? 1 : bytes / sequences};
}

}  // namespace bytekernels
