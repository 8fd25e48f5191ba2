// The operands of linear layers in 8 bits: the packed layout of weights, and quantised rows.
#pragma once
#include <limits>
#include <tuple>
#include <utility>
#include "gemm/pack.h"

// Older compilers and assemblers do not know AVX-VNNI.
#if VB_AVX512 || (VB_AVX2 && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12))
#define VB_BYTES 1
#include <cpuid.h>
#else
#define VB_BYTES 0
#endif

namespace linear {

constexpr int64_t GROUP = 4;         // inputs of a lane per product
constexpr int64_t BYTE_INPUTS = 64;  // of a tile of weights

static int64_t padded_bytes(int64_t in_features) { return round_up(in_features, BYTE_INPUTS); }

// Elements of a packed weight.
[[maybe_unused]] static int64_t packed_bytes(int64_t out_features, int64_t in_features) {
  return padded(out_features) * padded_bytes(in_features);
}

// [out_features][in_features] → [panels][in_features / 64][tiles of the panel][16][W][4]: the axes
// of a tile are groups of inputs, outputs, and the inputs of a group. Without tiles, vectors of a
// panel follow each other: [panels][in_features / 4][vectors of the panel][W][4]. Padded with zeros.
[[maybe_unused]] static void pack(const int8_t* weight, int64_t out_features, int64_t in_features,
                                  int8_t* out) {
  const int64_t inputs = has_tiles() ? BYTE_INPUTS : GROUP;
  for (int64_t n = 0; n < out_features; n += PANEL) {
    const int64_t tiles = std::min<int64_t>(PANEL, padded(out_features) - n) / W;
    for (int64_t k = 0; k < padded_bytes(in_features); k += inputs) {
      for (int64_t i = 0; i < tiles * W * inputs; i++, out++) {
        const int64_t tile = i / (W * inputs), group = i / (W * GROUP) % (inputs / GROUP);
        const int64_t row = n + tile * W + i / GROUP % W, column = k + GROUP * group + i % GROUP;
        const bool inside = row < out_features && column < in_features;
        *out = inside ? weight[row * in_features + column] : int8_t{0};
      }
    }
  }
}

#if VB_BYTES
// Whether this CPU, which has the vectors of this library, has AVX512-VNNI or AVX-VNNI.
static bool has_products_of_bytes() {
  static const bool has = [] {
    unsigned a, b, c, d;
#if VB_AVX512
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
#else
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  }();
  return has;
}

// Rows of unsigned bytes: x = scale · (byte - zero).
struct Bytes {
  const uint8_t* in;
  int64_t stride, in_features;  // whole groups
  const float *scale, *shift;   // per row; shift is scale · zero
};

// ---- quantisation ------------------------------------------------------------------------------
#if VB_AVX512
using I = __m512i;
static VB_INLINE I load_vector(const void* p) { return _mm512_loadu_si512(p); }
static VB_INLINE void store_vector(void* p, I x) { _mm512_storeu_si512(p, x); }
static VB_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }  // to nearest even
static VB_INLINE F to_floats(I x) { return _mm512_cvtepi32_ps(x); }
static VB_INLINE float least(F v) { return _mm512_reduce_min_ps(v); }
static VB_INLINE float most(F v) { return _mm512_reduce_max_ps(v); }
// Four vectors of integers, plus `zero`, to bytes, clipped to 0 … 255.
static VB_INLINE void put_bytes(uint8_t* out, I a, I b, I c, I d, int zero) {
  const I places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I shift = _mm512_set1_epi16(static_cast<int16_t>(zero));
  const I packed = _mm512_packus_epi16(_mm512_adds_epi16(_mm512_packs_epi32(a, b), shift),
                                       _mm512_adds_epi16(_mm512_packs_epi32(c, d), shift));
  store_vector(out, _mm512_permutexvar_epi32(places, packed));
}
static VB_INLINE I zeros() { return _mm512_setzero_si512(); }
static VB_INLINE I load_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
#else
using I = __m256i;
static VB_INLINE I load_vector(const void* p) {
  return _mm256_loadu_si256(static_cast<const I*>(p));
}
static VB_INLINE void store_vector(void* p, I x) { _mm256_storeu_si256(static_cast<I*>(p), x); }
static VB_INLINE I to_int(F x) { return _mm256_cvtps_epi32(x); }
static VB_INLINE F to_floats(I x) { return _mm256_cvtepi32_ps(x); }
static VB_INLINE float least(F v) {
  float lanes[W], x;
  simd::store(lanes, v);
  x = lanes[0];
  for (int l = 1; l < W; l++) x = std::min(x, lanes[l]);
  return x;
}
static VB_INLINE float most(F v) { return -least(simd::zero() - v); }
static VB_INLINE void put_bytes(uint8_t* out, I a, I b, I c, I d, int zero) {
  const I places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const I shift = _mm256_set1_epi16(static_cast<int16_t>(zero));
  const I packed = _mm256_packus_epi16(_mm256_adds_epi16(_mm256_packs_epi32(a, b), shift),
                                       _mm256_adds_epi16(_mm256_packs_epi32(c, d), shift));
  store_vector(out, _mm256_permutevar8x32_epi32(packed, places));
}
static VB_INLINE I zeros() { return _mm256_setzero_si256(); }
static VB_INLINE I load_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}
#endif

constexpr float LEAST_STEP = std::numeric_limits<float>::min();  // whose inverse is finite
constexpr int64_t AT_ONCE = 4 * W;  // values quantised at a time

template <class T>
static VB_INLINE F scaled_input(const T* in, const float* scale, int lanes) {
  const F x = simd::get(in, lanes);
  return scale ? x * simd::get(scale, lanes) : x;
}

// The scale and zero of a row whose values, and zero, take up all bytes. A row with infinities or
// NaN has a scale of NaN, so that all its outputs are NaN.
template <class T>
static VB_INLINE std::pair<float, float> range_of(const T* in, const float* scale, int64_t count) {
  F low[2] = {simd::zero(), simd::zero()}, high[2] = {simd::zero(), simd::zero()};
  F odd[2] = {simd::zero(), simd::zero()};
  int64_t k = 0;
  for (; k + 2 * W <= count; k += 2 * W) {
    VB_UNROLL
    for (int i = 0; i < 2; i++) {
      const F x = scaled_input(in + k + i * W, scale ? scale + k + i * W : nullptr, W);
      low[i] = simd::min(x, low[i]);
      high[i] = simd::max(x, high[i]);
      odd[i] = simd::fma(x, simd::zero(), odd[i]);
    }
  }
  for (; k < count; k += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, count - k));
    const F x = scaled_input(in + k, scale ? scale + k : nullptr, lanes);
    low[0] = simd::min(x, low[0]);
    high[0] = simd::max(x, high[0]);
    odd[0] = simd::fma(x, simd::zero(), odd[0]);
  }
  const float bottom = least(simd::min(low[0], low[1])), top = most(simd::max(high[0], high[1]));
  // The difference of the largest numbers would be infinite.
  const float difference = top / 255 - bottom / 255;
  const float step = difference < LEAST_STEP ? 0 : difference;
  const float zero = step > 0 ? std::nearbyint(-bottom / step) : 0;
  return {step + simd::reduce_add(odd[0] + odd[1]), zero};
}

// Quantises a row; bytes of the padding are those of zero. With `CHECKED`, for a step that was not
// found by range_of: values may lie outside of the range, and the result is NaN if one is not finite,
// else 0.
template <bool CHECKED, class T>
static VB_INLINE float quantise(const T* in, const float* scale, int64_t count, int64_t padded,
                                float step, float zero, uint8_t* out) {
  const F factor = simd::set1(step > 0 ? 1 / step : 0), limit = simd::set1(0x1p14f);
  const int shift = static_cast<int>(zero);
  F odd = simd::zero();
  const auto integers = [&](int64_t place, int lanes) VB_INLINE_LAMBDA {
    const F x = scaled_input(in + place, scale ? scale + place : nullptr, lanes);
    if (!CHECKED) return to_int(x * factor);
    odd = simd::fma(x, simd::zero(), odd);
    return to_int(simd::min(limit, x * factor));
  };
  int64_t k = 0;
  for (; k + AT_ONCE <= count; k += AT_ONCE) {
    put_bytes(out + k, integers(k, W), integers(k + W, W), integers(k + 2 * W, W),
              integers(k + 3 * W, W), shift);
  }
  for (; k < padded; k += AT_ONCE) {
    I part[4];
    for (int i = 0; i < 4; i++) {
      const int64_t left = std::clamp<int64_t>(count - k - i * W, 0, W);
      part[i] = left ? integers(k + i * W, static_cast<int>(left)) : zeros();
    }
    put_bytes(out + k, part[0], part[1], part[2], part[3], shift);
  }
  return CHECKED ? simd::reduce_add(odd) : 0;
}

#else
static bool has_products_of_bytes() { return false; }
#endif

}  // namespace linear
