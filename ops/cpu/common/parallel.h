// Tasks shared out to threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace parallel {

// Calls work(0) … work(tasks - 1) on at most `threads` threads; throws std::bad_alloc if one did.
template <class Work>
static void for_each(int64_t tasks, int64_t threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
    bool failed = false;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(std::min(threads, tasks)))
    for (int64_t i = 0; i < tasks; i++) {
      try {
        work(i);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t i = 0; i < tasks; i++) work(i);
}

}  // namespace parallel
