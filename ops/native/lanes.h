// Where fewer channels are left than a vector has lanes.
#pragma once
#include "simd.h"

namespace simd {

// The first `lanes` of `x`.
template <class T>
static VB_INLINE void put(T* out, F x, int lanes) {
  if (lanes == W) {
    store_from_float(out, x);
    return;
  }
  float value[W];
  store(value, x);
  for (int l = 0; l < lanes; l++) assign(out + l, value[l]);
}

// `lanes` values, zeros behind them.
static VB_INLINE F get(const float* in, int lanes) {
  if (lanes == W) return load(in);
  float value[W] = {};
  for (int l = 0; l < lanes; l++) value[l] = in[l];
  return load(value);
}

}  // namespace simd
