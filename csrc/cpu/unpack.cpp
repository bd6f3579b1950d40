#include "pack.h"

#include <algorithm>
#include <cstring>

#include "cpu/pieces.h"
#include "parallel.h"

namespace bytekernels {
namespace {

void fill(uint8_t* out, int64_t bytes, const uint8_t* element, int64_t element_bytes) {
  if (bytes == 0) return;
  if (std::all_of(element, element + element_bytes, [&](uint8_t byte) { return byte == element[0]; })) {
    std::memset(out, element[0], bytes);
    return;
  }
  std::memcpy(out, element, element_bytes);
  for (int64_t filled = element_bytes; filled < bytes;) {
    const int64_t count = std::min(filled, bytes - filled);
    std::memcpy(out + filled, out, count);
    filled += count;
  }
}

}  // namespace

void unpack(const uint8_t* values, const int32_t* cu, int64_t sequences, const uint8_t* pad, int64_t element_bytes,
            int64_t row_bytes, int64_t length, uint8_t* padded, int threads) {
  parallel_for(sequences * length, grain_of(row_bytes), threads, [&](Range share) {
    const Copy copy(sequences * length * row_bytes);
    for (int64_t row = share.begin; row < share.end;) {
      const int64_t s = row / length;
      const int64_t start = s * length;  // of the padded sequence, among padded rows
      const int64_t end = std::min(start + length, share.end);
      const int64_t filled = std::clamp<int64_t>(start + cu[s + 1] - cu[s], row, end);
      copy(padded + row * row_bytes, values + (cu[s] + row - start) * row_bytes, (filled - row) * row_bytes);
      fill(padded + filled * row_bytes, (end - filled) * row_bytes, pad, element_bytes);
      row = end;
    }
  });
}

}  // namespace bytekernels
