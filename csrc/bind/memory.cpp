// Advice to the system about memory that Python has allocated.
#include <sys/mman.h>
#include <unistd.h>

#include "bindings.h"
#include "cpu/simd.h"

namespace bytekernels::memory_bindings {

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def(
      "advise_huge_pages",
      [](const Array& memory) {
#if defined(MADV_HUGEPAGE)
        const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
        const int64_t begin = round_up(static_cast<int64_t>(memory.address), page);
        const int64_t end = (static_cast<int64_t>(memory.address) + memory.bytes) / page * page;
        if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
      },
      "memory"_a,
      "Asks for huge pages behind the whole pages of memory not yet touched; without effect where refused.");
}

}  // namespace bytekernels::memory_bindings
