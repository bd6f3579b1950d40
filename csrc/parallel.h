// Threads for the CPU ops: the team of an OpenMP runtime that is already in the process (torch's), else std::thread.
//
// Linking OpenMP would bring in a second runtime beside the one inside torch's wheel, and with it a second team of
// threads that fights the first for the cores. So the loaded runtime is found and used without linking to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "ragged.h"

namespace bytekernels {

// Calls run(context, share) once for each share in [0, shares), on up to `shares` threads. What a share throws is
// rethrown here after all have ended; of several the one of the lowest share.
void parallel_shares(int shares, void (*run)(void* context, int share), void* context);

// Calls body(share) for each share in [0, shares).
template <class Body>
void parallel_shares(int shares, Body&& body) {
  auto run = [](void* context, int share) { (*static_cast<std::remove_reference_t<Body>*>(context))(share); };
  parallel_shares(shares, run, &body);
}

// How many shares to cut n elements into: at most `threads`, none smaller than `grain` elements.
inline int shares_for(int64_t n, int64_t grain, int threads) {
  return static_cast<int>(std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, std::max(threads, 1)));
}

// Calls body(Range) on contiguous shares of [0, n). The shares depend on n, grain and threads alone, so what a
// share computes is the same in every run. `grain`: the fewest elements worth a thread.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, Body&& body) {
  if (n <= 0) return;
  const int shares = shares_for(n, grain, threads);
  parallel_shares(shares, [&](int share) { body(share_of(n, shares, share)); });
}

// The runtime whose team is used: the path of its library, or "std::thread" while no OpenMP runtime is loaded.
std::string parallel_runtime();

}  // namespace bytekernels
