// The vectors of simd.h with AVX2.
#pragma once
#include <immintrin.h>

namespace simd {

constexpr int W = 8;
constexpr bool HAS_PERMUTE = true;
constexpr int REGISTERS = 16;
using F = __m256;
static VB_INLINE F set1(float x) { return _mm256_set1_ps(x); }
static VB_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
static VB_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
static VB_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static VB_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
static VB_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
static VB_INLINE F round(F x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static VB_INLINE F times_power_of_two(F x, F n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static VB_INLINE __m256i load_integers(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  const __m256i pairs = load_integers(p);
  return _mm256_castsi256_ps(part ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))
                                  : _mm256_slli_epi32(pairs, 16));
}
static VB_INLINE __m128i rounded(F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static VB_INLINE F permute(F v, const int32_t* index) {
  return _mm256_permutevar8x32_ps(v, load_integers(index));
}
static VB_INLINE F permute(F low, F high, const int32_t* index, int shift) {
  const __m256i i = _mm256_add_epi32(load_integers(index), _mm256_set1_epi32(shift));
  const F from_low = _mm256_permutevar8x32_ps(low, i),
          from_high = _mm256_permutevar8x32_ps(high, i);
  return _mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
static VB_INLINE F gather(const float* p, const int32_t* index) {
  return _mm256_i32gather_ps(p, load_integers(index), 4);
}
static VB_INLINE F keep_below(F v, const int32_t* limit, int at, F other) {
  const __m256i keep = _mm256_cmpgt_epi32(load_integers(limit), _mm256_set1_epi32(at));
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(keep));
}
static VB_INLINE bool all_equal(F a, F b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) == 0;
}

static VB_INLINE void store_from_float(BFloat16* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(v));
}
static VB_INLINE void stream(float* p, F v) { _mm256_stream_ps(p, v); }
static VB_INLINE void stream(BFloat16* p, F v) { store_from_float(p, v); }
static VB_INLINE void end_streams() { _mm_sfence(); }
static VB_INLINE void transpose(const float* const (&rows)[W], F (&r)[W]) {
  F t[4];
  VB_UNROLL
  for (int c = 0; c < 2; c++) {
    VB_UNROLL
    for (int l = 0; l < 4; l++) {
      t[l] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[l] + 4 * c)),
                                  _mm_loadu_ps(rows[l + 4] + 4 * c), 1);
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(t[0], t[1])),
                  b = _mm256_castps_pd(_mm256_unpackhi_ps(t[0], t[1]));
    const __m256d d = _mm256_castps_pd(_mm256_unpacklo_ps(t[2], t[3])),
                  e = _mm256_castps_pd(_mm256_unpackhi_ps(t[2], t[3]));
    r[4 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, d));
    r[4 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, d));
    r[4 * c + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, e));
    r[4 * c + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, e));
  }
}

}  // namespace simd
