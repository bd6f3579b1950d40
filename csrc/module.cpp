// The module bytekernels._C. Each file in bind/ adds its own functions (bindings.h).
#include <vector>

#include "bindings.h"

namespace bytekernels {
namespace {

// A function's static, so that it exists before the first registration, whichever file that is in.
std::vector<void (*)(py::module_&)>& registered() {
  static std::vector<void (*)(py::module_&)> bindings;
  return bindings;
}

}  // namespace

Binding::Binding(void (*bind)(py::module_&)) { registered().push_back(bind); }

void Binding::run_all(py::module_& module) {
  for (auto* bind : registered()) bind(module);
}

}  // namespace bytekernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels: arrays in as (address, bytes, owner), no torch.";
  bytekernels::Binding::run_all(m);
}
