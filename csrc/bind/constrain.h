// Arguments of constrain_ends that the CPU's and CUDA's bindings have in common.
#pragma once

#include "../constrain.h"
#include "bind/trie.h"

namespace bytekernels {

inline ConstrainedText constrained_text_of(const StringTrieArrays& trie, const Array& ids, const Array& log_odds,
                                           int64_t total) {
  return {string_trie_of(trie), pointer<const uint8_t>(ids, total, "ids"),
          pointer<const float>(log_odds, total, "log_odds")};
}

}  // namespace bytekernels
