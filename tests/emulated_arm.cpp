// Runs functions of 64-bit ARM libraries under qemu, see emulated.h.
#include "emulated.h"
#include <dlfcn.h>
#include <omp.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>
#include <atomic>

static void fail(const char* what) {
  std::perror(what);
  std::_Exit(1);
}

static void receive(void* to, size_t bytes) {
  for (char* at = static_cast<char*>(to); bytes;) {
    const ssize_t count = read(STDIN_FILENO, at, bytes);
    if (count == 0) std::_Exit(0);  // nobody asks any more
    if (count < 0) fail("read");
    at += count;
    bytes -= static_cast<size_t>(count);
  }
}

static void send(const void* from, size_t bytes) {
  for (const char* at = static_cast<const char*>(from); bytes;) {
    const ssize_t count = write(STDOUT_FILENO, at, bytes);
    if (count < 0) fail("write");
    at += count;
    bytes -= static_cast<size_t>(count);
  }
}

static void protect(void* begin, Word count, int how) {
  if (mprotect(begin, count * PAGE, how)) fail("mprotect");
}

static void show_pages(Word begin, Word count, const char* contents) {
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS;
  void* const room = mmap(nullptr, count * PAGE, PROT_READ | PROT_WRITE, kind, -1, 0);
  if (room == MAP_FAILED) fail("mmap");
  std::memcpy(room, contents, count * PAGE);
  protect(room, count, PROT_READ);
  const int where = MREMAP_MAYMOVE | MREMAP_FIXED;
  void* const place = reinterpret_cast<void*>(begin);
  if (mremap(room, count * PAGE, count * PAGE, where, place) != place) fail("mremap");
}

static void let_write(Word begin) {
  protect(reinterpret_cast<void*>(begin), 1, PROT_READ | PROT_WRITE);
}

static void remove_page(Word begin) { munmap(reinterpret_cast<void*>(begin), PAGE); }

static void on_fault(int, siginfo_t* info, void*) {
  static std::atomic_flag busy = ATOMIC_FLAG_INIT;
  while (busy.test_and_set()) usleep(10);
  if (!mend(reinterpret_cast<Word>(info->si_addr))) {
    std::fprintf(stderr, "nothing is at %p\n", info->si_addr);
    std::_Exit(1);
  }
  busy.clear();
}

// Kernels are given the threads that they share, see ops/cpu/build/openmp.py.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

static void* load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW);
  if (!library) fail(dlerror());
  using Use = void (*)(decltype(GOMP_parallel)*, int (*)(), int (*)());
  const auto use = reinterpret_cast<Use>(dlsym(library, "parallel_use"));
  if (use) use(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
  return library;
}

static void* find(void* library, const char* function) { return dlsym(library, function); }

static Word capabilities() { return getauxval(AT_HWCAP2); }

int main() {
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  serve();
}
