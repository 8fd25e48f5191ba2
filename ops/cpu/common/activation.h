// Activations of vectors of floats, applied by kernels before results are stored.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include "common/simd.h"

// glibc 2.29 added a version of exp that does not set errno; the older one computes the same.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif

namespace activation {

using simd::F;
using simd::W;

// In the order of ACTIVATIONS in ops/cpu/activations.py.
enum Kind : int64_t {
  NONE, RELU, GELU, SILU, HARDSWISH, RELU6, SIGMOID, TANH, SQUARED_RELU, HARDSIGMOID, GELU_TANH
};

static VB_INLINE F positive(F x) { return simd::max(simd::zero(), x); }  // NaN stays NaN
static VB_INLINE F negative(F x) { return simd::zero() - positive(simd::zero() - x); }

// x / (1 + exp(-x)), computed with an exponent that is never positive.
static VB_INLINE F silu(F x) {
  const F up = positive(x), down = negative(x);
  const F power = simd::exp2((down - up) * simd::set1(1.44269504f));
  return simd::fma(down, power, up) / (simd::set1(1.f) + power);
}

#if VB_AVX512
// GELU is x Φ(x) = max(x, 0) - |x| Φ(-|x|), and SiLU the same with the logistic function σ. AVX-512
// looks up one of 32 numbers in one instruction: these tails are split into 32 pieces around
// multiples of 1 / SCALE, each interpolated by a polynomial at Chebyshev nodes. The last piece ends
// at zero.
struct Normal {
  static constexpr double SCALE = 6.0;
  static double value(double x) { return 0.5 * std::erfc(x * std::sqrt(0.5)); }
};
struct Logistic {
  static constexpr double SCALE = 1.75;
  static double value(double x) { return 1.0 / (1.0 + std::exp(x)); }
};

// With CENTRED, polynomials are around the middle of pieces, which takes two more instructions, and
// keeps the terms of distant ones from cancelling.
template <class Curve, int TERMS, bool CENTRED>
struct Tail {
  static constexpr int PIECES = 2 * W;
  static constexpr double SCALE = Curve::SCALE, END = (PIECES - 0.5) / SCALE;
  float terms[TERMS][PIECES];

  Tail() {
    for (int piece = 0; piece < PIECES; piece++) {
      const double begin = std::max(0.0, (piece - 0.5) / SCALE), end = (piece + 0.5) / SCALE;
      const double origin = CENTRED ? piece / SCALE : 0.0;
      double node[TERMS], c[TERMS];  // divided differences, then Newton's form to powers
      for (int i = 0; i < TERMS; i++) {
        const double share = 0.5 - 0.5 * std::cos(std::acos(-1.0) * (2 * i + 1) / (2 * TERMS));
        const double place = begin + share * (end - begin);
        node[i] = place - origin;
        c[i] = Curve::value(place);
        if (piece == PIECES - 1) c[i] -= share * Curve::value(end);
      }
      for (int order = 1; order < TERMS; order++) {
        for (int i = TERMS - 1; i >= order; i--) {
          c[i] = (c[i] - c[i - 1]) / (node[i] - node[i - order]);
        }
      }
      for (int order = TERMS - 2; order >= 0; order--) {
        for (int i = order; i < TERMS - 1; i++) c[i] -= node[order] * c[i + 1];
      }
      for (int i = 0; i < TERMS; i++) terms[i][piece] = static_cast<float>(c[i]);
    }
  }
};

template <class Curve, int TERMS, bool CENTRED = false>
static VB_INLINE void subtract_tail(F* x, int count) {
  using Table = Tail<Curve, TERMS, CENTRED>;
  static const Table tail;
  F low[TERMS], high[TERMS];
  for (int i = 0; i < TERMS; i++) {
    low[i] = simd::load(tail.terms[i]);
    high[i] = simd::load(tail.terms[i] + W);
  }
  constexpr int SMALLER_MAGNITUDE = 0b1010;  // of two numbers; the other one if one is NaN
  const F end = simd::set1(static_cast<float>(Table::END * (1 - 0x1p-20)));
  const F scale = simd::set1(static_cast<float>(Table::SCALE));
  const F width = simd::set1(static_cast<float>(1 / Table::SCALE));
  const F rounding = simd::set1(0x1.8p23f);  // leaves integers in the low bits
  for (int i = 0; i < count; i++) {
    const F place = _mm512_range_ps(x[i], end, SMALLER_MAGNITUDE);
    const F rounded = simd::fma(place, scale, rounding);
    const __m512i piece = _mm512_castps_si512(rounded);
    const F at = CENTRED ? _mm512_fnmadd_ps(rounded - rounding, width, place) : place;
    F sum = _mm512_permutex2var_ps(low[TERMS - 1], piece, high[TERMS - 1]);
    for (int term = TERMS - 2; term >= 0; term--) {
      sum = simd::fma(sum, at, _mm512_permutex2var_ps(low[term], piece, high[term]));
    }
    x[i] = _mm512_fnmadd_ps(place, sum, positive(x[i]));
  }
}

// The error is below 2e-7 for floats, and below 1e-5 for results rounded to bfloat16.
template <class T>
static VB_INLINE void gelu(F* x, int count) {
  subtract_tail<Normal, std::is_same_v<T, float> ? 4 : 3>(x, count);
}

// Below 3e-7, and 6e-6.
template <class T>
static VB_INLINE void silu(F* x, int count) {
  constexpr bool wide = std::is_same_v<T, float>;
  subtract_tail<Logistic, wide ? 5 : 4, wide>(x, count);
}

#else
// x Φ(x) = max(x, 0) - |x| Φ(-|x|), with Φ by formula 7.1.26 of Abramowitz and Stegun, "Handbook of
// Mathematical Functions", within 8e-8.
static VB_INLINE F gelu(F x) {
  const F magnitude = positive(x) - negative(x), one = simd::set1(1.f);
  const F t = one / simd::fma(magnitude, simd::set1(0.3275911f * 0.70710678f), one);
  F half = simd::fma(t, simd::set1(0.5f * 1.061405429f), simd::set1(0.5f * -1.453152027f));
  half = simd::fma(half, t, simd::set1(0.5f * 1.421413741f));
  half = simd::fma(half, t, simd::set1(0.5f * -0.284496736f));
  half = simd::fma(half, t, simd::set1(0.5f * 0.254829592f));
  const F power = simd::exp2(magnitude * magnitude * simd::set1(-0.72134752f));  // -log2(e) / 2
  return positive(x) - magnitude * (half * t) * power;
}

template <class T>
static VB_INLINE void gelu(F* x, int count) {
  for (int i = 0; i < count; i++) x[i] = gelu(x[i]);
}

template <class T>
static VB_INLINE void silu(F* x, int count) {
  for (int i = 0; i < count; i++) x[i] = silu(x[i]);
}
#endif

// exp(scale * x), at most 2^126; NaN stays NaN.
static VB_INLINE F limited_exp(F x, float scale) {
  return simd::exp2(simd::min(simd::set1(126.f), x * simd::set1(1.44269504f * scale)));
}

static VB_INLINE F sigmoid(F x) {
  const F one = simd::set1(1.f);
  return one / (one + limited_exp(x, -1));
}

// Within 1.4e-7 of the value, not of its size.
static VB_INLINE F tanh(F x) {
  const F one = simd::set1(1.f), power = limited_exp(x, -2);
  return (one - power) / (one + power);
}

static VB_INLINE F relu6(F x) { return simd::min(simd::set1(6.f), positive(x)); }  // NaN stays NaN

static VB_INLINE F hardswish(F x) {
  return x * relu6(x + simd::set1(3.f)) * simd::set1(1.f / 6.f);
}

static VB_INLINE F hardsigmoid(F x) {
  return relu6(x + simd::set1(3.f)) * simd::set1(1.f / 6.f);
}

// x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the approximation of GELU by tanh.
static VB_INLINE F gelu_tanh(F x) {
  const F cubic = simd::fma(x * x, simd::set1(0.044715f * 1.59576912f), simd::set1(1.59576912f));
  return x * sigmoid(x * cubic);
}

// RELU and RELU6 take two instructions, so that micro-kernels inline them.
static VB_INLINE bool is_clip(int64_t kind) { return kind == RELU || kind == RELU6; }
static VB_INLINE F clip_limit(int64_t kind) {
  return simd::set1(kind == RELU6 ? 6.f : std::numeric_limits<float>::infinity());
}
static VB_INLINE F clip(F x, F limit) { return simd::min(limit, positive(x)); }  // NaN stays NaN

// In place, for results of type T. Not inlined, to keep kernels with many variants fast to compile.
template <class T>
static __attribute__((noinline)) void apply(F* x, int count, int64_t kind) {
  switch (kind) {
    case RELU:
      for (int i = 0; i < count; i++) x[i] = positive(x[i]);
      break;
    case GELU:
      gelu<T>(x, count);
      break;
    case SILU:
      silu<T>(x, count);
      break;
    case HARDSWISH:
      for (int i = 0; i < count; i++) x[i] = hardswish(x[i]);
      break;
    case RELU6:
      for (int i = 0; i < count; i++) x[i] = relu6(x[i]);
      break;
    case SIGMOID:
      for (int i = 0; i < count; i++) x[i] = sigmoid(x[i]);
      break;
    case TANH:
      for (int i = 0; i < count; i++) x[i] = tanh(x[i]);
      break;
    case SQUARED_RELU:
      for (int i = 0; i < count; i++) x[i] = positive(x[i]) * positive(x[i]);
      break;
    case HARDSIGMOID:
      for (int i = 0; i < count; i++) x[i] = hardsigmoid(x[i]);
      break;
    case GELU_TANH:
      for (int i = 0; i < count; i++) x[i] = gelu_tanh(x[i]);
      break;
    default:
      break;
  }
}

}  // namespace activation
