// Tasks shared out to the threads of the OpenMP runtime that torch has loaded. A library that was
// linked with a runtime might get another one, whose pool of threads stands in the way of torch's; so
// none is, and ops/cpu/openmp.py hands torch's over when it loads a library.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

namespace parallel {

// What GCC's code calls for `#pragma omp parallel`; LLVM's and Intel's runtimes have the same.
struct Runtime {
  void (*run)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();   // this one's number in the region
  int (*threads)();  // of the region, which may be fewer than were asked for
};

// Without one, all is done by the thread that calls.
static Runtime runtime;

// Calls part(index, count) for all parts of a whole, as many as there are threads,
// `threads` at most.
template <class Part>
static void in_threads(int64_t threads, const Part& part) {
  if (threads <= 1 || !runtime.run) return part(0, 1);
  runtime.run([](void* data) { (*static_cast<const Part*>(data))(runtime.thread(), runtime.threads()); },
              const_cast<void*>(static_cast<const void*>(&part)), static_cast<unsigned>(threads), 0);
}

// Calls work(0) … work(tasks - 1) on at most `threads` threads, each of which gets a run of them;
// throws std::bad_alloc if memory ran out in one.
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

// The same for tasks that take unequal time: each thread takes the next one when it is done, and
// none is begun once memory ran out.
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
