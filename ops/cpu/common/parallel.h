// Distributes tasks over the threads of torch's OpenMP runtime. A library linked with a runtime
// might load a different one, whose thread pool would compete with torch's. So kernels are not
// linked with any, and ops/cpu/build/openmp.py passes torch's runtime to each library that it loads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

namespace parallel {

// The functions that GCC's code calls for `#pragma omp parallel`; LLVM's and Intel's runtimes have
// them, too.
struct Runtime {
  void (*run)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();   // this thread's number in the region
  int (*threads)();  // in the region, possibly fewer than requested
};

// Without a runtime, the calling thread does everything.
static Runtime runtime;

// Calls part(index, count) on each thread, on at most `threads` threads.
template <class Part>
static void in_threads(int64_t threads, const Part& part) {
  if (threads <= 1 || !runtime.run) return part(0, 1);
  runtime.run([](void* data) { (*static_cast<const Part*>(data))(runtime.thread(), runtime.threads()); },
              const_cast<void*>(static_cast<const void*>(&part)), static_cast<unsigned>(threads), 0);
}

// Calls work(0) … work(tasks - 1) on at most `threads` threads, each with a contiguous run of
// tasks; throws std::bad_alloc if any ran out of memory.
template <class Work>
static void for_each(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<bool> failed{false};
  const auto run = [&](int64_t index, int64_t count) {
    const int64_t whole = tasks / count, left = tasks % count;
    const int64_t begin = index * whole + std::min(index, left);
    const int64_t end = begin + whole + (index < left);
    for (int64_t i = begin; i < end; i++) {
      try {
        work(i);
      } catch (const std::exception&) {
        failed = true;
      }
    }
  };
  in_threads(std::min(threads, tasks), run);
  if (failed) throw std::bad_alloc();
}

// The same with dynamic scheduling, for tasks of unequal length; no task starts after memory ran
// out.
template <class Work>
static void for_each_in_turn(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<bool> failed{false};
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < tasks && !failed; i = next++) work(i);
    } catch (const std::exception&) {
      failed = true;
    }
  };
  in_threads(std::min(threads, tasks), run);
  if (failed) throw std::bad_alloc();
}

}  // namespace parallel

extern "C" void parallel_use(void (*run)(void (*)(void*), void*, unsigned, unsigned), int (*thread)(),
                             int (*threads)()) {
  parallel::runtime = {run, thread, threads};
}
