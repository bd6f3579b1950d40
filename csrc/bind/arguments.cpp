#include "bindings.h"

namespace bytekernels {

int64_t elements(const Array& array, int64_t size, const char* name) {
  const auto [address, bytes] = array;
  if (bytes < 0 || bytes % size != 0) refuse(name, " has ", bytes, " bytes, not a multiple of ", size);
  if (address == 0 && bytes > 0) refuse(name, " is a null pointer to ", bytes, " bytes");
  return bytes / size;
}

int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(result, size, &result)) refuse("sizes are too large: their product passes 2^63");
  }
  return result;
}

Offsets offsets(const Array& array, int64_t total, const char* name) {
  const int64_t count = elements(array, sizeof(int32_t), name);
  if (count == 0) refuse(name, " must have S + 1 elements, got none");
  const int32_t* cu = pointer<const int32_t>(array, count, name);
  const int64_t sequences = count - 1;
  const int64_t bad = first_malformed(cu, sequences, total);
  if (bad == 0 && cu[0] != 0) refuse(name, " must start at 0, got ", cu[0]);
  if (bad > 0 && cu[bad] < cu[bad - 1]) {
    refuse(name, " must not decrease, got ", cu[bad - 1], " > ", cu[bad], " at index ", bad - 1);
  }
  if (bad >= 0) refuse(name, " must end at ", total, ", the number of rows, got ", cu[sequences]);
  return {cu, sequences};
}

}  // namespace bytekernels
