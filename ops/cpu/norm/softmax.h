// Softmax over dense rows of logits, to which a table is added first.
#pragma once
#include "common/kernel.h"

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

constexpr int ROWS = simd::REGISTERS == 32 ? 4 : 2;  // at once: one's results are awaited meanwhile

// -inf beyond the last of a row's logits, else zero: added to its last vector.
static VB_INLINE F end_of(int64_t length) {
  const int rest = static_cast<int>((length - 1) % W + 1);
  float lanes[W];
  for (int l = 0; l < W; l++) lanes[l] = l < rest ? 0 : -std::numeric_limits<float>::infinity();
  return simd::load(lanes);
}

// R rows of logits, round_up(length, W) apart, to dense ones of the result. `most` are their largest
// logits, in any lanes. Stores of parts of vectors are slow to load again, so that `kept`, the
// logits, has whole ones, with -inf at the end. They are overwritten.
template <int R, class T>
static VB_INLINE void of_rows(int64_t length, float* kept, F (&most)[R], T* out) {
  const int64_t last = (length - 1) / W * W, step = last + W;
  const int rest = static_cast<int>(length - last);
  const F scale = simd::set1(LOG2E);
  F sum[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) most[r] = simd::set1(largest(most[r])), sum[r] = simd::zero();
  for (int64_t c = last; c >= 0; c -= W) {
    F x[R];
    VB_UNROLL
    for (int r = 0; r < R; r++) x[r] = (simd::load(kept + r * step + c) - most[r]) * scale;
    simd::exp2(x);
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      simd::store(kept + r * step + c, x[r]);
      sum[r] = sum[r] + x[r];
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    const F factor = simd::set1(1.f / simd::reduce_add(sum[r]));
    const float* const from = kept + r * step;
    for (int64_t c = 0; c < last; c += W) {
      simd::store_from_float(out + r * length + c, simd::load(from + c) * factor);
    }
    simd::put(out + r * length + last, simd::load(from + last) * factor, rest);
  }
}

// The same for logits `pitch` apart to which R rows of a table are added first.
template <int R, class B, class T>
static void of_sums(int64_t length, const float* in, int64_t pitch, const B* const (&bias)[R], F end,
                    float* kept, T* out) {
  const int64_t last = (length - 1) / W * W, step = last + W;
  const int rest = static_cast<int>(length - last);
  F most[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    const F tail = simd::get(in + r * pitch + last, rest) + simd::get(bias[r] + last, rest) + end;
    simd::store(kept + r * step + last, tail);
    most[r] = tail;
  }
  for (int64_t c = 0; c < last; c += W) {
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const F x = simd::load(in + r * pitch + c) + simd::load_as_float(bias[r] + c);
      simd::store(kept + r * step + c, x);
      most[r] = simd::max(most[r], x);
    }
  }
  of_rows(length, kept, most, out);
}

// Calls work(std::integral_constant<int, R>, i) for every R rows from i on.
template <class Work>
static VB_INLINE void each_rows(int64_t begin, int64_t end, const Work& work) {
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS) work(std::integral_constant<int, ROWS>(), i);
  for (; i < end; i++) work(std::integral_constant<int, 1>(), i);
}

template <class B, class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t tasks = std::min(p.threads, p.rows);
  const F end = end_of(p.length);
  parallel::for_each(tasks, tasks, [&](int64_t index) {
    static thread_local ScratchBuffer<float> buffer;
    float* const kept = buffer.of(ROWS * simd::round_up(p.length, W));
    each_rows(p.rows * index / tasks, p.rows * (index + 1) / tasks, [&](auto size, int64_t i) {
      constexpr int R = size.value;
      const B* bias[R];
      for (int r = 0; r < R; r++) {
        bias[r] = static_cast<const B*>(t.bias) + (i + r) % p.period * p.length;
      }
      of_sums<R>(p.length, t.in + i * p.pitch, p.pitch, bias, end, kept,
                 static_cast<T*>(t.out) + i * p.length);
    });
  });
}

}  // namespace softmax
