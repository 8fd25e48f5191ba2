// Runs a kernel for Windows in threads: of the runtime in the DLL of the first argument, as torch
// ships it, or of a stand-in for it. Ends with 0 if all of them work and the results are the same
// as in one thread.
#include <windows.h>
#include <cstdio>
#include <set>
#include <thread>
#include <vector>
#include "pooling/pooling.cpp"

constexpr int THREADS = 3;

static int wanted;
static thread_local int number;
static int thread() { return number; }
static int threads() { return wanted; }
static void limit(parallel::Place*, int32_t, int32_t threads) { wanted = threads; }
static int32_t global(parallel::Place*) { return 0; }
static void fork(parallel::Place*, int32_t, parallel::Region region, ...) {
  va_list arguments;
  va_start(arguments, region);
  void* const data = va_arg(arguments, void*);
  va_end(arguments);
  std::vector<std::thread> running;
  for (int i = 0; i < wanted; i++) {
    running.emplace_back([=] {
      number = i;
      region(nullptr, nullptr, data);
    });
  }
  for (std::thread& one : running) one.join();
}

int main(int count, char** arguments) {
  if (count > 1) {
    const HMODULE runtime = LoadLibraryA(arguments[1]);
    if (!runtime) return 2;
    const auto find = [&](const char* name) { return reinterpret_cast<void*>(GetProcAddress(runtime, name)); };
    parallel_use(reinterpret_cast<decltype(&fork)>(find("__kmpc_fork_call")),
                 reinterpret_cast<decltype(&limit)>(find("__kmpc_push_num_threads")),
                 reinterpret_cast<decltype(&global)>(find("__kmpc_global_thread_num")),
                 reinterpret_cast<int (*)()>(find("omp_get_thread_num")),
                 reinterpret_cast<int (*)()>(find("omp_get_num_threads")));
  } else {
    parallel_use(fork, limit, global, thread, threads);
  }
  std::set<DWORD> seen;
  CRITICAL_SECTION lock;
  InitializeCriticalSection(&lock);
  parallel::in_threads(THREADS, [&](int64_t, int64_t) {
    EnterCriticalSection(&lock);
    seen.insert(GetCurrentThreadId());
    LeaveCriticalSection(&lock);
  });
  if (seen.size() != THREADS) return 3;
  constexpr int64_t SIDE = 64, CHANNELS = 24;
  pooling::Problem problem = {2, SIDE, SIDE, CHANNELS, {SIDE * SIDE * CHANNELS, SIDE * CHANNELS, CHANNELS}, {2, 2}, 0, 1};
  std::vector<float> in(2 * SIDE * SIDE * CHANNELS), alone(in.size() / 4), together(in.size() / 4);
  for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i * 7919 % 1000);
  if (pooling_forward(&problem, in.data(), alone.data())) return 4;
  problem.threads = THREADS;
  if (pooling_forward(&problem, in.data(), together.data())) return 5;
  return alone == together && alone[1] != 0 ? 0 : 6;
}
