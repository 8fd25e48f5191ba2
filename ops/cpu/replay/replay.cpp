// Replays a captured list of kernel calls: the C interface, called from ops/replay/replay.py, which
// writes the lists.
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

// Copies, sums, differences, products, their sums, and row lookups of small tensors, for calls
// between kernels where torch's call overhead exceeds the compute time.
namespace pointwise {

// With the values of ops/replay/lowering.py.
enum Operation : int64_t { COPY, ADD, MULTIPLY, SUBTRACT, ADD_PRODUCT };

constexpr int MOST_AXES = 6;

// lowering.py fills in these fields. Strides are in elements; those of the last axis are 1 for the
// result, and 0 or 1 for the operands. Along `table_axis`, if it is an axis, the first operand is
// indexed by the table. Only ADD_PRODUCT, first * second + third, has a third operand.
struct Problem {
  int64_t operation, element_bytes, axes, table_axis, threads;
  int64_t sizes[MOST_AXES];
  int64_t out_strides[MOST_AXES], first_strides[MOST_AXES], second_strides[MOST_AXES];
  int64_t third_strides[MOST_AXES];
};

struct Tensors {
  void* out;
  const void* first;
  const void* second;
  const void* third;
  const int64_t* table;
};

template <Operation OPERATION, int64_t A_STEP, int64_t B_STEP, class T>
static void combine(T* out, const T* a, const T* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = simd::to_float(a[i * A_STEP]), y = simd::to_float(b[i * B_STEP]);
    simd::assign(out + i, OPERATION == ADD ? x + y : OPERATION == SUBTRACT ? x - y : x * y);
  }
}

template <Operation OPERATION, class T>
static void combine_row(T* out, const void* first, const void* second, int64_t a_step,
                        int64_t b_step, int64_t count) {
  const T *const a = static_cast<const T*>(first), *const b = static_cast<const T*>(second);
  if (a_step && b_step) return combine<OPERATION, 1, 1>(out, a, b, count);
  if (a_step) return combine<OPERATION, 1, 0>(out, a, b, count);
  if (b_step) return combine<OPERATION, 0, 1>(out, a, b, count);
  combine<OPERATION, 0, 0>(out, a, b, count);
}

template <Operation OPERATION>
static void combine_row(const Problem& p, char* out, const char* a, const char* b) {
  const int64_t last = p.axes - 1, count = p.sizes[last];
  const int64_t a_step = p.first_strides[last], b_step = p.second_strides[last];
  if (p.element_bytes == sizeof(float)) {
    combine_row<OPERATION>(reinterpret_cast<float*>(out), a, b, a_step, b_step, count);
  } else {
    combine_row<OPERATION>(reinterpret_cast<BFloat16*>(out), a, b, a_step, b_step, count);
  }
}

template <class T>
static void add_product_row(const Problem& p, char* to, const char* first, const char* second,
                            const char* third) {
  const int64_t last = p.axes - 1, count = p.sizes[last];
  const int64_t a_step = p.first_strides[last], b_step = p.second_strides[last];
  const int64_t c_step = p.third_strides[last];
  const T *const a = reinterpret_cast<const T*>(first), *const b = reinterpret_cast<const T*>(second);
  const T* const c = reinterpret_cast<const T*>(third);
  T* const out = reinterpret_cast<T*>(to);
  const auto of = [&](int64_t i, int64_t j, int64_t k) VB_INLINE_LAMBDA {
    const float product = simd::to_float(a[i]) * simd::to_float(b[j]);
    return product + simd::to_float(c[k]);
  };
  if (a_step && b_step && c_step) {
    for (int64_t i = 0; i < count; ++i) simd::assign(out + i, of(i, i, i));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      simd::assign(out + i, of(i * a_step, i * b_step, i * c_step));
    }
  }
}

static inline void copy_row(const Problem& p, char* out, const char* a) {
  const int64_t count = p.sizes[p.axes - 1], bytes = p.element_bytes;
  if (p.first_strides[p.axes - 1]) {
    std::memcpy(out, a, count * bytes);
  } else {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * bytes, a, bytes);
  }
}

// Runs all rows within an axis, from the offsets of the preceding axes.
static void run_axis(const Problem& p, const Tensors& t, int64_t axis, char* out, const char* a,
                     const char* b, const char* c) {
  if (axis == p.axes - 1) {
    switch (p.operation) {
      case ADD_PRODUCT:
        return p.element_bytes == sizeof(float) ? add_product_row<float>(p, out, a, b, c)
                                                : add_product_row<BFloat16>(p, out, a, b, c);
      case COPY:
        return copy_row(p, out, a);
      case ADD:
        return combine_row<ADD>(p, out, a, b);
      case SUBTRACT:
        return combine_row<SUBTRACT>(p, out, a, b);
      default:
        return combine_row<MULTIPLY>(p, out, a, b);
    }
  }
  for (int64_t i = 0; i < p.sizes[axis]; ++i) {
    const int64_t at = axis == p.table_axis ? t.table[i] : i;
    run_axis(p, t, axis + 1, out + i * p.out_strides[axis] * p.element_bytes,
             a + at * p.first_strides[axis] * p.element_bytes,
             b + i * p.second_strides[axis] * p.element_bytes,
             c + i * p.third_strides[axis] * p.element_bytes);
  }
}

// Runs the part of the first axis from `begin` to `end`.
static void run_part(Problem p, Tensors t, int64_t begin, int64_t end) {
  const int64_t bytes = begin * p.element_bytes;
  p.sizes[0] = end - begin;
  if (p.table_axis == 0) t.table += begin;
  run_axis(p, t, 0, static_cast<char*>(t.out) + bytes * p.out_strides[0],
           static_cast<const char*>(t.first) + (p.table_axis ? bytes * p.first_strides[0] : 0),
           static_cast<const char*>(t.second) + bytes * p.second_strides[0],
           static_cast<const char*>(t.third) + bytes * p.third_strides[0]);
}

static void run(const Problem& p, const Tensors& t) {
  const int64_t size = p.sizes[0], tasks = std::min(p.threads, size);
  parallel::for_each(tasks, p.threads, [&](int64_t index) {
    run_part(p, t, size * index / tasks, size * (index + 1) / tasks);
  });
}

}  // namespace pointwise

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

// Which of the dictionaries that Python watches have changed, for ops/fuse/watchers.py.
namespace watching {

constexpr int64_t LAST = 1024;  // changes that are remembered
constexpr int64_t NEAR = 8;     // of them, among which a dictionary is noted once
enum Event { MODIFIED = 1 };    // a name gets another value, perhaps the same one

int64_t known = 0;  // how many changes were read
void* (*value_of)(void* dict, void* name) = nullptr;

}  // namespace watching

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

// One problem after the other. Returns 0.
int replay_pointwise(const pointwise::Problem* problems, const pointwise::Tensors* tensors,
                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) pointwise::run(problems[i], tensors[i]);
  return 0;
}

// Whether words in memory have the given values; none after one that differs is read.
int replay_same_words(int64_t count, const int64_t* const* word, const int64_t* value) {
  constexpr int64_t AHEAD = 64;
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) __builtin_prefetch(word[i + AHEAD]);
    if (*word[i] != value[i]) return 0;
  }
  return 1;
}

// The number of changes, and the dictionaries of the last ones, which may be gone.
int64_t replay_changes = 0;
void* replay_changed[watching::LAST];

// The number of changes. As of all functions below, the caller holds the GIL.
int64_t replay_read_changes() { return watching::known = replay_changes; }

// `value_of` is PyDict_GetItem.
void replay_watch(void* (*value_of)(void*, void*)) { watching::value_of = value_of; }

// A PyDict_WatchCallback: notes that a dictionary is about to change.
int replay_note_change(int event, void* dict, void* name, void* value) {
  using namespace watching;
  if (event == MODIFIED && value_of(dict, name) == value) return 0;
  for (int64_t i = replay_changes; i > known && i > replay_changes - NEAR; --i) {
    if (replay_changed[(i - 1) % LAST] == dict) return 0;
  }
  replay_changed[replay_changes++ % LAST] = dict;
  return 0;
}

}  // extern "C"
