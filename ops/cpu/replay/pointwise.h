// Copies, sums, differences, products, their sums, and row lookups of small tensors, for calls
// between kernels where torch's call overhead exceeds the compute time.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

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
