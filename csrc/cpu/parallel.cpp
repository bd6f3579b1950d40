#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <climits>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bytekernels {
namespace {

// The entry points that GCC's runtime has and that LLVM's and Intel's offer for its sake.
struct OpenMP {
  std::string path;
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};

int consider_library(dl_phdr_info* info, size_t, void* out) {
  const std::string path = info->dlpi_name;
  const std::string name = path.substr(path.rfind('/') + 1);
  const bool is_openmp =
      name.rfind("libgomp", 0) == 0 || name.rfind("libiomp5", 0) == 0 || name.rfind("libomp", 0) == 0;
  if (is_openmp) static_cast<std::vector<std::string>*>(out)->push_back(path);
  return 0;
}

std::unique_ptr<OpenMP> load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  auto found = std::make_unique<OpenMP>();
  found->path = path;
  found->parallel = reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(library, "GOMP_parallel"));
  found->thread_num = reinterpret_cast<decltype(OpenMP::thread_num)>(dlsym(library, "omp_get_thread_num"));
  found->num_threads = reinterpret_cast<decltype(OpenMP::num_threads)>(dlsym(library, "omp_get_num_threads"));
  return found->parallel && found->thread_num && found->num_threads ? std::move(found) : nullptr;
}

// The loaded runtime, torch's first where there are several; null while there is none. Never unloaded once found.
const OpenMP* openmp() {
  static std::atomic<const OpenMP*> cached{nullptr};
  static std::mutex mutex;
  if (const OpenMP* found = cached.load(std::memory_order_acquire)) return found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const OpenMP* found = cached.load(std::memory_order_acquire)) return found;

  std::vector<std::string> paths;
  dl_iterate_phdr(consider_library, &paths);
  std::stable_partition(paths.begin(), paths.end(),
                        [](const std::string& path) { return path.find("/torch") != std::string::npos; });
  for (const std::string& path : paths) {
    if (auto found = load(path)) {
      cached.store(found.release(), std::memory_order_release);
      break;
    }
  }
  return cached.load(std::memory_order_acquire);
}

// Runs shares and keeps the exception of the lowest one that throws: none may leave an OpenMP region or a thread.
class Job {
 public:
  Job(int shares, void (*run)(void*, int), void* context) : shares_(shares), run_(run), context_(context) {}

  // The shares of one thread of a team, which may be smaller than asked for.
  void run_on(int thread, int team) noexcept {
    for (int share = thread; share < shares_; share += team) {
      try {
        run_(context_, share);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (share < failed_) {
          failed_ = share;
          exception_ = std::current_exception();
        }
      }
    }
  }

  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  int shares_;
  void (*run_)(void*, int);
  void* context_;
  std::mutex mutex_;
  int failed_ = INT_MAX;
  std::exception_ptr exception_;
};

}  // namespace

void parallel_shares(int shares, void (*run)(void*, int), void* context) {
  if (shares <= 1) {
    if (shares == 1) run(context, 0);
    return;
  }
  Job job(shares, run, context);
  if (const OpenMP* runtime = openmp()) {
    struct Region {
      Job& job;
      const OpenMP& runtime;
    } region{job, *runtime};
    auto enter = [](void* data) {
      auto& [job, runtime] = *static_cast<Region*>(data);
      job.run_on(runtime.thread_num(), runtime.num_threads());
    };
    runtime->parallel(enter, &region, static_cast<unsigned>(shares), 0);
  } else {
    std::vector<std::thread> threads;
    threads.reserve(shares - 1);
    int started = 1;
    try {
      for (; started < shares; ++started)
        threads.emplace_back([&job, started, shares] { job.run_on(started, shares); });
    } catch (const std::system_error&) {
      // The machine gives no more threads; this one does what is left.
      for (int share = started; share < shares; ++share) job.run_on(share, shares);
    }
    job.run_on(0, shares);
    for (std::thread& thread : threads) thread.join();
  }
  job.rethrow();
}

std::string parallel_runtime() {
  const OpenMP* runtime = openmp();
  return runtime ? runtime->path : "std::thread";
}

}  // namespace bytekernels
