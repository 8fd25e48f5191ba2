// A vector `F` of `W` floats and the operations that kernels need, for AVX-512, AVX2, NEON and,
// with the vector extensions of GCC and Clang, everything else. The instruction set is fixed at
// compile time: `build/` compiles a kernel once per instruction set and selects the library for
// the CPU at run time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(VB_PORTABLE)
// The compiler's vector extensions.
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define VB_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VB_AVX2 1
#elif defined(__AARCH64EL__) && defined(__ARM_NEON)
#define VB_NEON 1
#endif
#ifndef VB_NEON
#define VB_NEON 0
#endif

// Whether this CPU has instructions to round to bfloat16 and multiply pairs of bfloat16.
#if (VB_AVX512 && defined(__AVX512BF16__)) || \
    (VB_NEON && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define VB_BFLOAT16 1
#else
#define VB_BFLOAT16 0
#endif

#define VB_INLINE inline __attribute__((always_inline))
#define VB_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define VB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VB_UNROLL _Pragma("GCC unroll 32")
#endif

struct BFloat16 {
  uint16_t bits;
};

namespace simd {

// ---- numbers -----------------------------------------------------------------------------------
static VB_INLINE float to_float(float x) { return x; }
static VB_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

static VB_INLINE void assign(float* p, float x) { *p = x; }
// Round to nearest even; NaN stays NaN.
static VB_INLINE void assign(BFloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

}  // namespace simd

// Each instruction set defines:
//
// - W, REGISTERS, and HAS_PERMUTE: whether lookups in registers cost less than a gather
// - set1, load, store, fma
// - max(a, b), min(a, b): NaN where `b` is NaN
// - round: to integers, for |x| < 2^22; times_power_of_two(x, n): x 2^n, for an integer n
// - load_bf16, store_from_float: to bfloat16, to nearest even; NaN stays NaN
// - load_of_pairs(p, part): one element of each of W pairs
// - permute(v, index): v[index[l]] in lane l; permute(low, high, index, shift):
//   table[index[l] + shift], with the table's 2 W entries in two registers; gather(p, index):
//   p[index[l]]
// - keep_below(v, limit, at, other): v[l] where limit[l] > at, else other[l]
// - all_equal(a, b)
// - stream: a non-temporal store, which bypasses the caches and does not read the line first, for
//   whole cache lines not read soon; `p` is aligned to the size of a vector in memory. After
//   end_streams, other threads see this thread's streamed stores
// - transpose(rows, r): r[i][l] = rows[l][i]
#if VB_AVX512
#include "common/simd_avx512.h"
#elif VB_AVX2
#include "common/simd_avx2.h"
#elif VB_NEON
#include "common/simd_neon.h"
#else
#include "common/simd_portable.h"
#endif

namespace simd {

static VB_INLINE F zero() { return set1(0.f); }
// Clamps infinities to the largest finite numbers; NaN stays NaN.
static VB_INLINE F at_most_finite(F x) {
  return zero() - max(set1(-std::numeric_limits<float>::max()), zero() - x);
}
static VB_INLINE F finite(F x) {
  return at_most_finite(max(set1(-std::numeric_limits<float>::max()), x));
}

// Rounds up to a multiple.
template <class N>
static constexpr N round_up(N n, int64_t multiple) {
  return static_cast<N>((n + multiple - 1) / multiple * multiple);
}

// v[k] = load(p + k); 2 W floats must be readable at `p`.
template <size_t... K>
static VB_INLINE void load_run(const float* p, F (&v)[sizeof...(K)], std::index_sequence<K...>) {
#if VB_AVX512
  // All but one of those loads would cross a cache line, which takes twice as long.
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + W);
  ((v[K] = _mm512_castsi512_ps(_mm512_alignr_epi32(high, low, K))), ...);
#else
  ((v[K] = load(p + K)), ...);
#endif
}

// Makes the compiler load `v` once instead of repeating the load as an operand of each use.
static VB_INLINE F in_register(F v) {
#if VB_AVX512 || VB_AVX2
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// ---- functions ---------------------------------------------------------------------------------
// 2^x for x <= 126 with a relative error below 1e-7 (minimax polynomial on [-0.5, 0.5]). Below
// -126 it returns 2^-126, negligible next to the largest term of a softmax; NaN stays NaN. Several
// vectors step by step: a step of the next one is computed while that of the first is awaited.
template <int N>
static VB_INLINE void exp2(F (&x)[N]) {
  constexpr float TERMS[] = {1.5370704817e-4f, 1.3399848291e-3f, 9.6183732514e-3f,
                             5.5503290352e-2f, 2.4022648462e-1f, 6.9314720558e-1f, 1.f};
  F n[N], p[N];
  VB_UNROLL
  for (int i = 0; i < N; i++) x[i] = max(set1(-126.f), x[i]);
  VB_UNROLL
  for (int i = 0; i < N; i++) n[i] = round(x[i]);
  VB_UNROLL
  for (int i = 0; i < N; i++) x[i] = x[i] - n[i], p[i] = set1(TERMS[0]);
  VB_UNROLL
  for (int t = 1; t < 7; t++) {
    VB_UNROLL
    for (int i = 0; i < N; i++) p[i] = fma(p[i], x[i], set1(TERMS[t]));
  }
  VB_UNROLL
  for (int i = 0; i < N; i++) x[i] = times_power_of_two(p[i], n[i]);
}
static VB_INLINE F exp2(F x) {
  F one[] = {x};
  exp2(one);
  return one[0];
}

// 1 / x within 2 ulp, for normal x from 2^-120 to 2^120; NaN stays NaN.
static VB_INLINE F reciprocal(F x) {
#if VB_AVX512
  const F r = _mm512_rcp14_ps(x);
  return r * _mm512_fnmadd_ps(x, r, set1(2.f));
#else
  return set1(1.f) / x;
#endif
}

// log2(x) for normal x >= 1 with an absolute error below 2e-7 + 1 ulp: x = 2^n m with m in
// [0.7, 1.4], then the odd series of log((1 + t) / (1 - t)) is summed.
static VB_INLINE F log2(F x) {
  float value[W], mantissa[W], exponent[W];
  store(value, x);
  for (int l = 0; l < W; l++) {
    uint32_t bits;
    std::memcpy(&bits, value + l, sizeof bits);
    const uint32_t n = (bits - 0x3f3504f3u) >> 23;  // 0x3f3504f3 is sqrt(0.5)
    bits -= n << 23;
    std::memcpy(mantissa + l, &bits, sizeof bits);
    exponent[l] = static_cast<float>(static_cast<int32_t>(n));
  }
  const F m = load(mantissa), t = (m - set1(1.f)) / (m + set1(1.f)), t2 = t * t;
  F p = fma(set1(1.f / 9.f), t2, set1(1.f / 7.f));
  p = fma(p, t2, set1(1.f / 5.f));
  p = fma(p, t2, set1(1.f / 3.f));
  p = fma(p, t2, set1(1.f));
  return fma(t * set1(2.885390082f), p, load(exponent));  // 2 / ln 2
}

static VB_INLINE float reduce_add(F v) {
#if VB_AVX512
  return _mm512_reduce_add_ps(v);
#else
  float lanes[W], sum = 0.f;
  store(lanes, v);
  for (int l = 0; l < W; l++) sum += lanes[l];
  return sum;
#endif
}

// ---- loads and stores --------------------------------------------------------------------------
static VB_INLINE F load_as_float(const float* p) { return load(p); }
static VB_INLINE F load_as_float(const BFloat16* p) { return load_bf16(p); }

static VB_INLINE void store_from_float(float* p, F v) { store(p, v); }

// Two vectors, one after the other.
template <class T>
static VB_INLINE void store_two(T* p, F a, F b) {
#if VB_AVX512 && VB_BFLOAT16
  if constexpr (std::is_same_v<T, BFloat16>) {
    return _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
#endif
  store_from_float(p, a);
  store_from_float(p + W, b);
}

// ---- transposition -----------------------------------------------------------------------------
// out[i * out_pitch + l] = rows[l][i] * scale for l in 0..W-1 and i in 0..count-1, count <= W.
// Reads W elements of each row.
static VB_INLINE void transpose(const float* const (&rows)[W], float* out, size_t out_pitch,
                                int count, float scale = 1.f) {
  F r[W];
  transpose(rows, r);
  const F factor = set1(scale);
  if (count == W) {
    VB_UNROLL
    for (int i = 0; i < W; i++) store(out + i * out_pitch, r[i] * factor);
  } else {
    float spill[W][W];
    for (int i = 0; i < W; i++) store(spill[i], r[i] * factor);
    for (int i = 0; i < count; i++) store(out + i * out_pitch, load(spill[i]));
  }
}

// The same for rows `in_pitch` apart.
static VB_INLINE void transpose(const float* in, size_t in_pitch, float* out, size_t out_pitch,
                                int count) {
  const float* rows[W];
  VB_UNROLL
  for (int l = 0; l < W; l++) rows[l] = in + l * in_pitch;
  transpose(rows, out, out_pitch, count);
}

}  // namespace simd
