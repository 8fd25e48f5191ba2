// Partial vectors, for channels left over at the end.
#pragma once
#include "common/simd.h"

namespace simd {

#if VB_AVX512
static VB_INLINE __mmask16 first(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }

// Stores the first `lanes` of `x`.
static VB_INLINE void put(float* out, F x, int lanes) {
  if (lanes == W) return store(out, x);
  _mm512_mask_storeu_ps(out, first(lanes), x);
}
static VB_INLINE void put(BFloat16* out, F x, int lanes) {
  _mm256_mask_storeu_epi16(out, first(lanes), rounded(x));
}

// Loads `lanes` values, followed by zeros.
static VB_INLINE F get(const float* in, int lanes) {
  if (lanes == W) return load(in);
  return _mm512_maskz_loadu_ps(first(lanes), in);
}
static VB_INLINE F get(const BFloat16* in, int lanes) {
  return widened(_mm256_maskz_loadu_epi16(first(lanes), in));
}

#else
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

template <class T>
static VB_INLINE F get(const T* in, int lanes) {
  if (lanes == W) return load_as_float(in);
  float value[W] = {};
  for (int l = 0; l < lanes; l++) value[l] = to_float(in[l]);
  return load(value);
}
#endif

// Copies `count` values, a vector at a time.
template <class T>
static VB_INLINE void copy(const T* in, int64_t count, T* out) {
  int64_t i = 0;
#if VB_AVX512
  constexpr int64_t lanes = 64 / sizeof(T);
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4);
  for (; i + lanes <= count; i += lanes) _mm512_storeu_si512(out + i, _mm512_loadu_si512(in + i));
  const uint64_t rest = (uint64_t{1} << (count - i)) - 1;
  if constexpr (sizeof(T) == 4) {
    const auto mask = static_cast<__mmask16>(rest);
    if (rest) _mm512_mask_storeu_epi32(out + i, mask, _mm512_maskz_loadu_epi32(mask, in + i));
  } else if constexpr (sizeof(T) == 2) {
    const auto mask = static_cast<__mmask32>(rest);
    if (rest) _mm512_mask_storeu_epi16(out + i, mask, _mm512_maskz_loadu_epi16(mask, in + i));
  } else {
    if (rest) _mm512_mask_storeu_epi8(out + i, rest, _mm512_maskz_loadu_epi8(rest, in + i));
  }
#else
  for (; i + W <= count; i += W) std::memcpy(out + i, in + i, W * sizeof(T));
  for (; i < count; i++) out[i] = in[i];
#endif
}

}  // namespace simd
