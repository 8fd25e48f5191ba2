// Replays a captured list of kernel calls: the C interface, called from ops/replay/replay.py, which
// writes the lists.
#include <cstdint>
#include <cstring>

#include "replay/pointwise.h"

namespace {

using Word = int64_t;

constexpr int MOST_ARGUMENTS = 4;
constexpr int64_t SCRATCH_BYTES = 4096;

// Kinds of arguments, with the values of ops/replay/replay.py.
enum Kind : Word { VALUE, PLACE, BLOCK };

char* place(const Word* words, char* const* bases) { return bases[words[0]] + words[1]; }

// Reads an argument from the list. A block is copied to `scratch` before addresses are written to
// it, so that several threads can run the same list.
Word argument(const Word*& words, char*& scratch, char* const* bases) {
  switch (*words++) {
    case PLACE: {
      char* const address = place(words, bases);
      words += 2;
      return reinterpret_cast<Word>(address);
    }
    case BLOCK: {
      const Word bytes = words[1], addresses = words[2];
      char* const block = scratch;
      std::memcpy(block, reinterpret_cast<const void*>(words[0]), bytes);
      scratch += (bytes + 15) / 16 * 16;
      words += 3;
      for (Word i = 0; i < addresses; ++i, words += 3) {
        char* const address = place(words + 1, bases);
        std::memcpy(block + words[0], &address, sizeof(address));
      }
      return reinterpret_cast<Word>(block);
    }
    default:
      return *words++;
  }
}

int call(Word function, Word count, const Word* a) {
  switch (count) {
    case 2:
      return reinterpret_cast<int (*)(Word, Word)>(function)(a[0], a[1]);
    case 3:
      return reinterpret_cast<int (*)(Word, Word, Word)>(function)(a[0], a[1], a[2]);
    default:
      return reinterpret_cast<int (*)(Word, Word, Word, Word)>(function)(a[0], a[1], a[2], a[3]);
  }
}

}  // namespace

extern "C" {

// The maximum bytes of the blocks of one call, each rounded up to 16.
int64_t replay_scratch_bytes() { return SCRATCH_BYTES; }

// Runs the calls from `words` to `end`. Returns 0, or 1 if a kernel ran out of memory.
int replay_run(const Word* words, const Word* end, char* const* bases) {
  alignas(64) char scratch[SCRATCH_BYTES];
  while (words < end) {
    const Word function = *words++, count = *words++;
    char* free = scratch;
    Word arguments[MOST_ARGUMENTS];
    for (Word i = 0; i < count; ++i) arguments[i] = argument(words, free, bases);
    if (call(function, count, arguments)) return 1;
  }
  return 0;
}

// See pointwise.h; one problem after the other. Returns 0.
int replay_pointwise(const pointwise::Problem* problems, const pointwise::Tensors* tensors,
                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) pointwise::run(problems[i], tensors[i]);
  return 0;
}

// Whether Python dictionaries still hold the same objects: `counts` are their sizes, `values` all
// their values in order. For a dictionary with a count of -1 - n, only its size n is compared.
// `size` and `next` are PyDict_Size and PyDict_Next; the caller holds the GIL.
int replay_same_values(intptr_t (*size)(void*), int (*next)(void*, intptr_t*, void**, void**),
                        int64_t dicts, void* const* dict, const int64_t* counts,
                        void* const* values) {
  for (int64_t i = 0; i < dicts; ++i) {
    const int64_t count = counts[i];
    if (size(dict[i]) != (count < 0 ? -1 - count : count)) return 0;
    if (count <= 0) continue;
    intptr_t position = 0;
    void* value = nullptr;
    while (next(dict[i], &position, nullptr, &value)) {
      if (value != *values++) return 0;
    }
  }
  return 1;
}

// Prefetches cache lines. What has moved is fetched in vain.
void replay_prefetch(int64_t count, void* const* lines) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(lines[i], 0, 2);
}

}  // extern "C"
