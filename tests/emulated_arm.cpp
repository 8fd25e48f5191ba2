// Runs functions of ARM libraries under qemu for emulated_arm.py, which sends their names and
// arguments. Addresses among these, and in what they point to, are those of the sender's memory: a
// page of it that is touched is fetched to the same address, and what was changed is sent back when
// the function returns.
#include <dlfcn.h>
#include <omp.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

using Word = uint64_t;

constexpr Word PAGE = 4096, MOST_PAGES = 64;  // that are fetched at once
constexpr int ARGUMENTS = 6;
// What is asked of this program, and what it says.
enum Command : Word { LOAD, CALL, CAPABILITIES };
enum Message : Word { FETCH, DONE };

struct Page {
  std::unique_ptr<char[]> before;  // as it was fetched
  bool changed = false;
};
static std::map<Word, Page> pages;
static std::atomic_flag busy = ATOMIC_FLAG_INIT;

[[noreturn]] static void fail(const char* what) {
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

static Word receive_word() {
  Word word;
  receive(&word, sizeof word);
  return word;
}

static std::string receive_text() {
  std::string text(receive_word(), '\0');
  receive(text.data(), text.size());
  return text;
}

static void protect(Word begin, Word count, int how) {
  if (mprotect(reinterpret_cast<void*>(begin), count * PAGE, how)) fail("mprotect");
}

// The page at `begin`, and some behind it. They appear at once, as other threads may look for them.
static bool fetch(Word begin) {
  Word wanted = 1;
  while (wanted < MOST_PAGES && !pages.count(begin + wanted * PAGE)) wanted++;
  const Word question[] = {FETCH, begin, wanted};
  send(question, sizeof question);
  const Word count = receive_word();
  if (!count) return false;
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS;
  void* const room = mmap(nullptr, count * PAGE, PROT_READ | PROT_WRITE, kind, -1, 0);
  if (room == MAP_FAILED) fail("mmap");
  receive(room, count * PAGE);
  for (Word i = 0; i < count; i++) {
    Page& page = pages[begin + i * PAGE];
    page.before.reset(new char[PAGE]);
    std::memcpy(page.before.get(), static_cast<char*>(room) + i * PAGE, PAGE);
  }
  protect(reinterpret_cast<Word>(room), count, PROT_READ);
  const int where = MREMAP_MAYMOVE | MREMAP_FIXED;
  void* const place = reinterpret_cast<void*>(begin);
  if (mremap(room, count * PAGE, count * PAGE, where, place) != place) fail("mremap");
  return true;
}

static void on_fault(int, siginfo_t* info, void*) {
  while (busy.test_and_set()) usleep(10);
  const Word begin = reinterpret_cast<Word>(info->si_addr) / PAGE * PAGE;
  const auto found = pages.find(begin);
  if (found == pages.end()) {
    if (!fetch(begin)) {
      std::fprintf(stderr, "nothing is at %p\n", info->si_addr);
      std::_Exit(1);
    }
  } else if (!found->second.changed) {
    found->second.changed = true;
    protect(begin, 1, PROT_READ | PROT_WRITE);
  }
  busy.clear();
}

// All bytes that are others than they were, as addresses, counts and bytes.
static std::string changes() {
  std::string said;
  for (const auto& [begin, page] : pages) {
    if (!page.changed) continue;
    const char *now = reinterpret_cast<const char*>(begin), *before = page.before.get();
    for (Word i = 0; i < PAGE;) {
      Word end = i;
      while (end < PAGE && now[end] != before[end]) end++;
      if (end > i) {
        const Word run[] = {begin + i, end - i};
        said.append(reinterpret_cast<const char*>(run), sizeof run);
        said.append(now + i, end - i);
      }
      i = end + 1;
    }
  }
  return said;
}

static void forget_pages() {
  for (const auto& page : pages) munmap(reinterpret_cast<void*>(page.first), PAGE);
  pages.clear();
}

// Kernels are given the threads that they share, see ops/cpu/build/openmp.py.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

// And the kernel of linear layers, which is loaded before those that call it, see ops/cpu/build/libraries.py.
static void* gemm = nullptr;

static void* load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW);
  if (!library) fail(dlerror());
  if (void* const forward = dlsym(library, "linear_forward")) gemm = forward;
  const auto use_gemm = reinterpret_cast<void (*)(void*)>(dlsym(library, "linear_use"));
  if (use_gemm) use_gemm(gemm);
  using Use = void (*)(decltype(GOMP_parallel)*, int (*)(), int (*)());
  const auto use = reinterpret_cast<Use>(dlsym(library, "parallel_use"));
  if (use) use(GOMP_parallel, omp_get_thread_num, omp_get_num_threads);
  return library;
}

static Word call(void* library, const char* name) {
  Word a[ARGUMENTS];
  receive(a, sizeof a);
  using Function = Word (*)(Word, Word, Word, Word, Word, Word);
  const auto function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) fail(name);
  return function(a[0], a[1], a[2], a[3], a[4], a[5]);
}

int main() {
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  std::vector<void*> libraries;
  while (true) {
    const Word command = receive_word();
    Word result = 0;
    if (command == LOAD) {
      result = libraries.size();
      libraries.push_back(load(receive_text().c_str()));
    } else if (command == CALL) {
      void* const library = libraries[receive_word()];
      result = call(library, receive_text().c_str());
    } else {
      result = getauxval(AT_HWCAP2);
    }
    const std::string said = changes();
    forget_pages();
    const Word answer[] = {DONE, result, said.size()};
    send(answer, sizeof answer);
    send(said.data(), said.size());
  }
}
