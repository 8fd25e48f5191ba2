// Products of the operand types of kernels.
#pragma once
#include <type_traits>
#include "common/lanes.h"

// Intel CPUs with AMX also have the instruction for pairs, but multiply floats twice as fast
// (https://github.com/libxsmm/tpp-mlir/pull/1025).
#if VB_BFLOAT16 && !defined(__AMX_TILE__)
#define VB_PAIRS 1
#else
#define VB_PAIRS 0
#endif

namespace simd {

// Single numbers, in float32.
struct Floats {
  static constexpr int COUNT = 1;
  static VB_INLINE void add_product(F& sum, F x, F y) { sum = fma(x, y, sum); }
};

#if VB_PAIRS
// Pairs of bfloat16, with products accumulated in float32.
struct Pairs {
  static constexpr int COUNT = 2;
#if VB_NEON
  static VB_INLINE void add_product(F& sum, F x, F y) { sum = add_pairs(sum, x, y); }
  // Lane by lane.
  static VB_INLINE F pack(F first, F second) {
    const uint16x4_t a = rounded(first), b = rounded(second);
    return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(a, b), vzip2_u16(a, b)));
  }
  static VB_INLINE F pack(const BFloat16* first, const BFloat16* second, int lanes) {
    const uint32x4_t low = vreinterpretq_u32_f32(get(first, lanes));
    const uint32x4_t high = vreinterpretq_u32_f32(get(second, lanes));
    return vreinterpretq_f32_u32(vsriq_n_u32(high, low, 16));
  }
  static VB_INLINE F without_second(F x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0xffff)));
  }
  static VB_INLINE F without_first(F x) {
    return vreinterpretq_f32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 16));
  }
  // Of V vectors each.
  template <int V>
  static VB_INLINE void pack(const BFloat16* first, const BFloat16* second, F (&out)[V]) {
    VB_UNROLL
    for (int v = 0; v < V; v++) out[v] = pack(first + v * W, second + v * W, W);
  }
  template <int V>
  static VB_INLINE void pack(const BFloat16* first, F (&out)[V]) {
    VB_UNROLL
    for (int v = 0; v < V; v++) {
      const uint32x4_t bits = vreinterpretq_u32_f32(load_bf16(first + v * W));
      out[v] = vreinterpretq_f32_u32(vshrq_n_u32(bits, 16));
    }
  }
#else
  static VB_INLINE void add_product(F& sum, F x, F y) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
  }
  // The numbers from `first` on, each followed by one from `second` on.
  static VB_INLINE __m512i alternating(int first, int second) {
    const auto words = [=](int lane) { return (lane + second) << 16 | (lane + first); };
    return _mm512_setr_epi32(words(0), words(1), words(2), words(3), words(4), words(5), words(6),
                             words(7), words(8), words(9), words(10), words(11), words(12),
                             words(13), words(14), words(15));
  }
  static VB_INLINE F pack(F first, F second) {
    const __m512i places = alternating(0, W);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, both));
  }
  static VB_INLINE F pack(const BFloat16* first, const BFloat16* second, int lanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(simd::first(lanes), first));
    const F high = widened(_mm256_maskz_loadu_epi16(simd::first(lanes), second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(high)));
  }
  static VB_INLINE F without_second(F x) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff)));
  }
  // The second of each pair becomes the first; the new second is zero.
  static VB_INLINE F without_first(F x) {
    return _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
  }
  // V vectors of pairs; without `second`, of numbers and zero.
  template <int V>
  static VB_INLINE void pack(const BFloat16* first, const BFloat16* second, F (&out)[V]) {
    static_assert(V <= 2);
    if constexpr (V == 2) {
      const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
      VB_UNROLL
      for (int v = 0; v < 2; v++) {
        const __m512i places = alternating(v * W, 2 * W + v * W);
        out[v] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, places, b));
      }
    } else {
      out[0] = pack(first, second, W);
    }
  }
  template <int V>
  static VB_INLINE void pack(const BFloat16* first, F (&out)[V]) {
    VB_UNROLL
    for (int v = 0; v < V; v++) {
      const auto words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + v * W));
      out[v] = _mm512_castsi512_ps(_mm512_cvtepu16_epi32(words));
    }
  }
#endif
};
// The fastest operand type for values stored as T.
template <class T>
using Products = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Floats>;
#else
template <class T>
using Products = Floats;
#endif

// The number of steps that hold `count` numbers.
template <class P>
static constexpr int steps(int numbers) {
  return (numbers + P::COUNT - 1) / P::COUNT;
}

}  // namespace simd
