// What the threads of parallel.h do, for tests and bug reports.
#include "parallel.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
#include <vector>

#include "bindings.h"

namespace bytekernels::parallel_bindings {

BYTEKERNELS_BIND(m) {
  m.def("parallel_runtime", &parallel_runtime,
        "The OpenMP library whose threads the CPU ops run on, or 'std::thread' while none is loaded.");
  m.def(
      "parallel_probe",
      [](int64_t n, int threads, int64_t fail_at) {
        if (n < 0) refuse("n must be at least 0, got ", n);
        std::vector<int64_t> ids(n);
        {
          py::gil_scoped_release release;
          parallel_for(n, 1, threads, [&](Range range) {
            for (int64_t i = range.begin; i < range.end; ++i) {
              if (i == fail_at) throw std::runtime_error("element " + std::to_string(i) + " failed as asked");
              ids[i] = syscall(SYS_gettid);
            }
          });
        }
        py::list out;
        for (int64_t id : ids) out.append(id);
        return out;
      },
      py::arg("n"), py::arg("threads"), py::arg("fail_at") = -1,
      "The system's id of the thread that serves each of n elements; RuntimeError from element fail_at.");
}

}  // namespace bytekernels::parallel_bindings
