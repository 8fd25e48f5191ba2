// The vectors of simd.h with AVX-512.
#pragma once
#include <immintrin.h>

namespace simd {

constexpr int W = 16;
constexpr bool HAS_PERMUTE = true;
constexpr int REGISTERS = 32;
using F = __m512;
static VB_INLINE F set1(float x) { return _mm512_set1_ps(x); }
static VB_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
static VB_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
static VB_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static VB_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
static VB_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
static VB_INLINE F round(F x) { return _mm512_roundscale_ps(x, 0); }
static VB_INLINE F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
static VB_INLINE F widened(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return _mm512_castsi512_ps(part ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))
                                  : _mm512_slli_epi32(pairs, 16));
}
static VB_INLINE __m256i rounded(F v) {
#if VB_BFLOAT16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
#endif
}
static VB_INLINE F permute(F v, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), v);
}
static VB_INLINE F permute(F low, F high, const int32_t* index, int shift) {
  const __m512i i = _mm512_add_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(shift));
  return _mm512_permutex2var_ps(low, i, high);
}
static VB_INLINE F gather(const float* p, const int32_t* index) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
}
static VB_INLINE F keep_below(F v, const int32_t* limit, int at, F other) {
  const __mmask16 keep = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(limit), _mm512_set1_epi32(at));
  return _mm512_mask_mov_ps(other, keep, v);
}
static VB_INLINE bool all_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) == 0; }

static VB_INLINE void store_from_float(BFloat16* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v));
}
static VB_INLINE void stream(float* p, F v) { _mm512_stream_ps(p, v); }
static VB_INLINE void stream(BFloat16* p, F v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded(v));
}
static VB_INLINE void end_streams() { _mm_sfence(); }
static VB_INLINE void transpose(const float* const (&rows)[W], F (&r)[W]) {
  // Each register holds the same four columns of lanes l, l+4, l+8, l+12, so that two rounds of
  // unpacking complete the transpose.
  F t[4];
  VB_UNROLL
  for (int c = 0; c < 4; c++) {
    VB_UNROLL
    for (int l = 0; l < 4; l++) {
      F v = _mm512_castps128_ps512(_mm_loadu_ps(rows[l] + 4 * c));
      v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[l + 4] + 4 * c), 1);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[l + 8] + 4 * c), 2);
      t[l] = _mm512_insertf32x4(v, _mm_loadu_ps(rows[l + 12] + 4 * c), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1])),
                  b = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
    const __m512d d = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3])),
                  e = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
    r[4 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, d));
    r[4 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, d));
    r[4 * c + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    r[4 * c + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
}

}  // namespace simd
