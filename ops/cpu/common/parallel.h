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

#if defined(_WIN32)
// The functions that LLVM's code calls for `#pragma omp parallel`, of Intel's runtime, too.
struct Place {  // in the source, for tools
  int32_t reserved = 0, flags = 2, more[2] = {};
  const char* text = ";unknown;unknown;0;0;;";
};
using Region = void (*)(int32_t* thread, int32_t* of_the_region, void* data);
struct Runtime {
  void (*fork)(Place*, int32_t arguments, Region, ...);
  void (*limit)(Place*, int32_t thread, int32_t threads);  // of the next region
  int32_t (*number)(Place*);
  int (*thread)();   // this thread's number in the region
  int (*threads)();  // in the region, possibly fewer than requested

  void run(void (*region)(void*), void* data, unsigned threads, unsigned) const {
    static Place place;
    struct Call {
      void (*region)(void*);
      void* data;
    } call{region, data};
    limit(&place, number(&place), static_cast<int32_t>(threads));
    fork(&place, 1, [](int32_t*, int32_t*, void* of) {
      const Call& call = *static_cast<Call*>(of);
      call.region(call.data);
    }, &call);
  }
};
#else
// The functions that GCC's code calls for `#pragma omp parallel`; LLVM's and Intel's runtimes have
// them, too.
struct Runtime {
  void (*run)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();   // this thread's number in the region
  int (*threads)();  // in the region, possibly fewer than requested
};
#endif

// Without a runtime, the calling thread does everything.
static Runtime runtime;

// Calls part(index, count) on each thread, on at most `threads` threads.
template <class Part>
static void in_threads(int64_t threads, const Part& part) {
  if (threads <= 1 || !runtime.thread) return part(0, 1);
  const auto call = [](void* data) {
    (*static_cast<const Part*>(data))(runtime.thread(), runtime.threads());
  };
  runtime.run(call, const_cast<void*>(static_cast<const void*>(&part)),
              static_cast<unsigned>(threads), 0);
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

#if defined(_WIN32)
extern "C" void parallel_use(decltype(parallel::Runtime::fork) fork,
                             decltype(parallel::Runtime::limit) limit,
                             decltype(parallel::Runtime::number) number, int (*thread)(),
                             int (*threads)()) {
  parallel::runtime = {fork, limit, number, thread, threads};
}
#else
extern "C" void parallel_use(void (*run)(void (*)(void*), void*, unsigned, unsigned), int (*thread)(),
                             int (*threads)()) {
  parallel::runtime = {run, thread, threads};
}
#endif
