// What the programs of emulated_*.cpp share: they run functions of libraries for another system on
// the memory of emulators.py, which sends names and arguments. Addresses among these, and in what
// they point to, are those of the sender's memory: a page of it that is touched is fetched to the
// same address, and what was changed is sent back when the function returns.
#pragma once
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

// ---- of the system -----------------------------------------------------------------------------
[[noreturn]] static void fail(const char* what);
static void receive(void* to, size_t bytes);
static void send(const void* from, size_t bytes);
// Lets `count` pages with these contents appear at once, read-only.
static void show_pages(Word begin, Word count, const char* contents);
static void let_write(Word begin);
static void remove_page(Word begin);
static void* load(const char* path);
static void* find(void* library, const char* function);
static Word capabilities();

// ---- pages -------------------------------------------------------------------------------------
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

// Fetches the page at `begin`, and some behind it.
static bool fetch(Word begin) {
  Word wanted = 1;
  while (wanted < MOST_PAGES && !pages.count(begin + wanted * PAGE)) wanted++;
  const Word question[] = {FETCH, begin, wanted};
  send(question, sizeof question);
  const Word count = receive_word();
  if (!count) return false;
  std::vector<char> contents(count * PAGE);
  receive(contents.data(), contents.size());
  for (Word i = 0; i < count; i++) {
    Page& page = pages[begin + i * PAGE];
    page.before.reset(new char[PAGE]);
    std::memcpy(page.before.get(), contents.data() + i * PAGE, PAGE);
  }
  show_pages(begin, count, contents.data());
  return true;
}

// Whether a fault at an address is one of pages that are missing or must not be written to yet.
static bool mend(Word address) {
  const Word begin = address / PAGE * PAGE;
  const auto found = pages.find(begin);
  if (found == pages.end()) return fetch(begin);
  if (!found->second.changed) let_write(begin);
  found->second.changed = true;
  return true;
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
  for (const auto& page : pages) remove_page(page.first);
  pages.clear();
}

// ---- libraries ---------------------------------------------------------------------------------
static void* load_linked(const char* path) {
  // The kernel of linear layers is loaded before those that call it, see ops/cpu/build/libraries.py.
  static void* gemm = nullptr;
  void* const library = load(path);
  if (void* const forward = find(library, "linear_forward")) gemm = forward;
  const auto use_gemm = reinterpret_cast<void (*)(void*)>(find(library, "linear_use"));
  if (use_gemm) use_gemm(gemm);
  return library;
}

static Word call(void* library, const char* name) {
  Word a[ARGUMENTS];
  receive(a, sizeof a);
  using Function = Word (*)(Word, Word, Word, Word, Word, Word);
  const auto function = reinterpret_cast<Function>(find(library, name));
  if (!function) fail(name);
  return function(a[0], a[1], a[2], a[3], a[4], a[5]);
}

// Answers until nobody asks any more.
[[noreturn]] static void serve() {
  std::vector<void*> libraries;
  while (true) {
    const Word command = receive_word();
    Word result = 0;
    if (command == LOAD) {
      result = libraries.size();
      libraries.push_back(load_linked(receive_text().c_str()));
    } else if (command == CALL) {
      void* const library = libraries[receive_word()];
      result = call(library, receive_text().c_str());
    } else {
      result = capabilities();
    }
    const std::string said = changes();
    forget_pages();
    const Word answer[] = {DONE, result, said.size()};
    send(answer, sizeof answer);
    send(said.data(), said.size());
  }
}
