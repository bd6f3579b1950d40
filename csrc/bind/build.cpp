// What this module was built with.
#include "build.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "bindings.h"

namespace bytekernels::build_bindings {

// The parts of a list as CMake writes it.
py::tuple split(const std::string& list) {
  py::list parts;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(';', begin), list.size());
    parts.append(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(parts);
}

#ifdef BYTEKERNELS_SANITIZE
// Reads one element too far or adds one too many, for a test that sanitizers report it.
int overstep(bool memory, int n) {
  const std::vector<int> values(n, 0);
  return memory ? *(values.data() + n) : std::numeric_limits<int>::max() + n;
}
#endif

BYTEKERNELS_BIND(m) {
  m.attr("march") = kMarch;
  m.attr("sanitizers") = kSanitizers;
  m.attr("cuda_architectures") = split(kCudaArchitectures);
  m.attr("cuda_refusal") = kCudaRefusal;
#ifdef BYTEKERNELS_SANITIZE
  m.def("overstep", &overstep, py::arg("memory"), py::arg("n"));
#endif
}

}  // namespace bytekernels::build_bindings
