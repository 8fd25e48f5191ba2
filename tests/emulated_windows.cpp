// Runs functions of Windows libraries under Wine, see emulated.h; in one thread, since pages cannot
// appear at once there.
#include "emulated.h"
#include <windows.h>
#include <set>

constexpr Word BLOCK = 1 << 16;  // in which Windows reserves addresses
static std::set<Word> blocks;
static HANDLE input, output;

[[noreturn]] static void end(unsigned status) {
  TerminateProcess(GetCurrentProcess(), status);  // at once: nothing is left to be done
  std::abort();
}

static void fail(const char* what) {
  std::fprintf(stderr, "%s: error %lu\n", what, GetLastError());
  end(1);
}

static void receive(void* to, size_t bytes) {
  for (char* at = static_cast<char*>(to); bytes;) {
    DWORD count = 0;
    if (!ReadFile(input, at, static_cast<DWORD>(bytes), &count, nullptr) || !count) end(0);
    at += count;
    bytes -= count;
  }
}

static void send(const void* from, size_t bytes) {
  for (const char* at = static_cast<const char*>(from); bytes;) {
    DWORD count = 0;
    if (!WriteFile(output, at, static_cast<DWORD>(bytes), &count, nullptr)) fail("WriteFile");
    at += count;
    bytes -= count;
  }
}

static void protect(Word begin, Word count, DWORD how) {
  DWORD before;
  if (!VirtualProtect(reinterpret_cast<void*>(begin), count * PAGE, how, &before)) fail("VirtualProtect");
}

static void show_pages(Word begin, Word count, const char* contents) {
  for (Word block = begin / BLOCK * BLOCK; block < begin + count * PAGE; block += BLOCK) {
    if (!blocks.insert(block).second) continue;
    if (!VirtualAlloc(reinterpret_cast<void*>(block), BLOCK, MEM_RESERVE, PAGE_NOACCESS)) fail("reserve");
  }
  for (Word i = 0; i < count; i++) {
    void* const place = reinterpret_cast<void*>(begin + i * PAGE);
    if (!VirtualAlloc(place, PAGE, MEM_COMMIT, PAGE_READWRITE)) fail("commit");
  }
  std::memcpy(reinterpret_cast<void*>(begin), contents, count * PAGE);
  for (Word i = 0; i < count; i++) protect(begin + i * PAGE, 1, PAGE_READONLY);
}

static void let_write(Word begin) { protect(begin, 1, PAGE_READWRITE); }

static void remove_page(Word begin) {
  const Word block = begin / BLOCK * BLOCK;
  if (blocks.erase(block)) VirtualFree(reinterpret_cast<void*>(block), 0, MEM_RELEASE);
}

static LONG CALLBACK on_fault(EXCEPTION_POINTERS* error) {
  const EXCEPTION_RECORD* const what = error->ExceptionRecord;
  if (what->ExceptionCode != EXCEPTION_ACCESS_VIOLATION) return EXCEPTION_CONTINUE_SEARCH;
  if (mend(what->ExceptionInformation[1])) return EXCEPTION_CONTINUE_EXECUTION;
  std::fprintf(stderr, "nothing is at %p\n", reinterpret_cast<void*>(what->ExceptionInformation[1]));
  end(1);
}

static void* load(const char* path) {
  void* const library = LoadLibraryA((std::string("Z:") + path).c_str());
  if (!library) fail(path);
  return library;
}

static void* find(void* library, const char* function) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), function));
}

static Word capabilities() { return 0; }

int main() {
  input = GetStdHandle(STD_INPUT_HANDLE);
  output = GetStdHandle(STD_OUTPUT_HANDLE);
  AddVectoredExceptionHandler(1, on_fault);
  serve();
}
