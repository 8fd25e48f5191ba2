// Activations of vectors of floats, for kernels that apply them before they store a result.
#pragma once
#include "simd.h"

namespace activation {

using simd::F;

// The order is that of ACTIVATIONS in ops/depthwise.py.
enum Kind : int64_t { NONE, RELU, GELU, SILU, HARDSWISH };

static VB_INLINE F positive(F x) { return simd::max(simd::zero(), x); }  // NaN stays NaN
static VB_INLINE F negative(F x) { return simd::zero() - positive(simd::zero() - x); }

// x Φ(x) = max(x, 0) - |x| erfc(|x| / √2) / 2, with erfc to 1.5e-7 by formula 7.1.26 of Abramowitz
// and Stegun, "Handbook of Mathematical Functions".
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

// x / (1 + exp(-x)), with an exponent that is never positive.
static VB_INLINE F silu(F x) {
  const F up = positive(x), down = negative(x);
  const F power = simd::exp2((down - up) * simd::set1(1.44269504f));
  return simd::fma(down, power, up) / (simd::set1(1.f) + power);
}

static VB_INLINE F hardswish(F x) {
  const F six = simd::set1(6.f), shifted = positive(x + simd::set1(3.f));
  const F clipped = six - positive(six - shifted);
  return x * clipped * simd::set1(1.f / 6.f);
}

// In place; not inlined, so that kernels with many variants compile in seconds.
static __attribute__((noinline)) void apply(F* x, int count, int64_t kind) {
  switch (kind) {
    case RELU:
      for (int i = 0; i < count; i++) x[i] = positive(x[i]);
      break;
    case GELU:
      for (int i = 0; i < count; i++) x[i] = gelu(x[i]);
      break;
    case SILU:
      for (int i = 0; i < count; i++) x[i] = silu(x[i]);
      break;
    case HARDSWISH:
      for (int i = 0; i < count; i++) x[i] = hardswish(x[i]);
      break;
    default:
      break;
  }
}

}  // namespace activation
