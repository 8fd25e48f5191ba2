// Softmax over dense rows of logits, to which a table is added first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace softmax {

using simd::F;
using simd::W;

// biased_softmax.py fills in these fields. Rows are `pitch` apart; the table is the same every
// `period` rows.
struct Problem {
  int64_t rows, length, pitch, period;
  int64_t half_bias, half;  // whether the table and the result are in bfloat16
  int64_t threads;
};

// `bias` is [period][length], `out` [rows][length].
struct Tensors {
  const float* in;
  const void* bias;
  void* out;
};

constexpr float LOG2E = 1.44269504f;

static VB_INLINE float largest(F v) {
#if VB_AVX512
  return _mm512_reduce_max_ps(v);
#else
  float lanes[W];
  simd::store(lanes, v);
  return *std::max_element(lanes, lanes + W);
#endif
}

// `end` is zero in the lanes of the row's last vector, and -inf beyond. Stores of parts of vectors
// are slow to load again, so that `kept` has whole ones.
template <class B, class T>
static void of_row(int64_t length, const float* in, const B* bias, F end, float* kept, T* out) {
  const int64_t last = (length - 1) / W * W;
  const int rest = static_cast<int>(length - last);
  const F tail = simd::get(in + last, rest) + simd::get(bias + last, rest) + end;
  F above = tail;
  for (int64_t c = 0; c < last; c += W) {
    const F x = simd::load(in + c) + simd::load_as_float(bias + c);
    simd::store(kept + c, x);
    above = simd::max(above, x);
  }
  const F most = simd::set1(largest(above)), scale = simd::set1(LOG2E);
  const F ended = simd::exp2((tail - most) * scale);
  F sum = ended;
  for (int64_t c = 0; c < last; c += W) {
    const F x = simd::exp2((simd::load(kept + c) - most) * scale);
    simd::store(kept + c, x);
    sum = sum + x;
  }
  const F factor = simd::set1(1.f / simd::reduce_add(sum));
  for (int64_t c = 0; c < last; c += W) {
    simd::store_from_float(out + c, simd::load(kept + c) * factor);
  }
  simd::put(out + last, ended * factor, rest);
}

template <class B, class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t tasks = std::min(p.threads, p.rows);
  parallel::for_each(tasks, tasks, [&](int64_t index) {
    static thread_local ScratchBuffer<float> buffer;
    float* const kept = buffer.of(simd::round_up(p.length, W));
    const int rest = static_cast<int>((p.length - 1) % W + 1);
    for (int l = 0; l < W; l++) kept[l] = l < rest ? 0 : -std::numeric_limits<float>::infinity();
    const F end = simd::load(kept);
    for (int64_t i = p.rows * index / tasks; i < p.rows * (index + 1) / tasks; i++) {
      of_row(p.length, t.in + i * p.pitch,
             static_cast<const B*>(t.bias) + i % p.period * p.length, end, kept,
             static_cast<T*>(t.out) + i * p.length);
    }
  });
}

static void forward(const Problem& p, const Tensors& t) {
  if (p.half_bias) {
    p.half ? forward<BFloat16, BFloat16>(p, t) : forward<BFloat16, float>(p, t);
  } else {
    p.half ? forward<float, BFloat16>(p, t) : forward<float, float>(p, t);
  }
}

}  // namespace softmax
