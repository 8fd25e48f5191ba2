// Vectors of bytes, and of the integers that they come from and are summed up to.
#pragma once
#include "common/kernel.h"

// Older compilers and assemblers do not know AVX-VNNI.
#if VB_AVX512 || (VB_AVX2 && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12))
#define VB_BYTES 1
#include <cpuid.h>
#elif VB_NEON
#define VB_BYTES 1
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#else
#define VB_BYTES 0
#endif

namespace linear {

using simd::F;
using simd::W;

// Whether this CPU, which has the vectors of this library, has AVX512-VNNI, AVX-VNNI or, on ARM,
// FEAT_DotProd.
static bool has_int8_products() {
#if VB_NEON && defined(__APPLE__)
  return true;  // all of Apple's have it
#elif VB_NEON && defined(__linux__)
  constexpr unsigned long dot_products = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & dot_products;
#elif VB_BYTES && !VB_NEON
  static const bool has = [] {
    unsigned a, b, c, d;
#if VB_AVX512
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
#else
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  }();
  return has;
#else
  return false;
#endif
}

#if VB_BYTES
#if !VB_NEON
constexpr int OFFSET = 0;  // bytes are stored as they are
// The largest of 16 numbers of 16 bits.
static VB_INLINE uint16_t most_of(__m128i low, __m128i high) {
  const __m128i ones = _mm_set1_epi16(-1);
  const __m128i inverse = _mm_minpos_epu16(_mm_xor_si128(_mm_max_epu16(low, high), ones));
  return static_cast<uint16_t>(~_mm_extract_epi16(inverse, 0));
}
#endif

#if VB_AVX512
using I = __m512i;
static VB_INLINE I load_vector(const void* p) { return _mm512_loadu_si512(p); }
static VB_INLINE void store_vector(void* p, I x) { _mm512_storeu_si512(p, x); }
static VB_INLINE I bits_of(F x) { return _mm512_castps_si512(x); }
static VB_INLINE F to_floats(I x) { return _mm512_cvtepi32_ps(x); }
static VB_INLINE float least(F v) { return _mm512_reduce_min_ps(v); }
static VB_INLINE float most(F v) { return _mm512_reduce_max_ps(v); }
static VB_INLINE I minus(I x, int y) { return _mm512_sub_epi32(x, _mm512_set1_epi32(y)); }
// Four vectors of integers to bytes, clipped to 0 … 255.
static VB_INLINE void put_bytes(uint8_t* out, I a, I b, I c, I d) {
  const I places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I packed = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  store_vector(out, _mm512_permutexvar_epi32(places, packed));
}
// Two vectors of 16 bits to bytes, clipped to 0 … 255.
static VB_INLINE void put_bytes(uint8_t* out, I a, I b) {
  const I places = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store_vector(out, _mm512_permutexvar_epi64(places, _mm512_packus_epi16(a, b)));
}
// The lower halves of 32 bits, alternately of two vectors.
static VB_INLINE I alternate(I even, I odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
}
static VB_INLINE F even_floats(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
static VB_INLINE F odd_floats(I pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}
static VB_INLINE I max_signed(I a, I b) { return _mm512_max_epi16(a, b); }
static VB_INLINE I max_unsigned(I a, I b) { return _mm512_max_epu16(a, b); }
static VB_INLINE I zeros() { return _mm512_setzero_si512(); }
static VB_INLINE uint16_t most_of(I v) {
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  return most_of(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
// 1 to 2 · W values, then zeros.
static VB_INLINE I load_part(const BFloat16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(~__mmask32{0} >> (2 * W - count), p);
}
static VB_INLINE I in_all_lanes(int32_t x) { return _mm512_set1_epi32(x); }
#elif VB_AVX2
using I = __m256i;
static VB_INLINE I load_vector(const void* p) {
  return _mm256_loadu_si256(static_cast<const I*>(p));
}
static VB_INLINE void store_vector(void* p, I x) { _mm256_storeu_si256(static_cast<I*>(p), x); }
static VB_INLINE I bits_of(F x) { return _mm256_castps_si256(x); }
static VB_INLINE F to_floats(I x) { return _mm256_cvtepi32_ps(x); }
static VB_INLINE float least(F v) {
  float lanes[W], x;
  simd::store(lanes, v);
  x = lanes[0];
  for (int l = 1; l < W; l++) x = std::min(x, lanes[l]);
  return x;
}
static VB_INLINE float most(F v) { return -least(simd::zero() - v); }
static VB_INLINE I minus(I x, int y) { return _mm256_sub_epi32(x, _mm256_set1_epi32(y)); }
static VB_INLINE void put_bytes(uint8_t* out, I a, I b, I c, I d) {
  const I places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const I packed = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  store_vector(out, _mm256_permutevar8x32_epi32(packed, places));
}
static VB_INLINE void put_bytes(uint8_t* out, I a, I b) {
  store_vector(out, _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0b11011000));
}
static VB_INLINE I alternate(I even, I odd) {
  return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0b10101010);
}
static VB_INLINE F even_floats(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
static VB_INLINE F odd_floats(I pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}
static VB_INLINE I max_signed(I a, I b) { return _mm256_max_epi16(a, b); }
static VB_INLINE I max_unsigned(I a, I b) { return _mm256_max_epu16(a, b); }
static VB_INLINE I zeros() { return _mm256_setzero_si256(); }
static VB_INLINE uint16_t most_of(I v) {
  return most_of(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
static VB_INLINE I in_all_lanes(int32_t x) { return _mm256_set1_epi32(x); }
#elif VB_NEON
// SDOT multiplies signed bytes, so 0 … 255 are stored as -128 … 127.
constexpr int OFFSET = 128;
using I = int32x4_t;
static VB_INLINE I load_vector(const void* p) { return simd::read<I>(p); }
static VB_INLINE void store_vector(void* p, I x) { std::memcpy(p, &x, sizeof x); }
static VB_INLINE I bits_of(F x) { return vreinterpretq_s32_f32(x); }
static VB_INLINE F to_floats(I x) { return vcvtq_f32_s32(x); }
static VB_INLINE float least(F v) { return vminvq_f32(v); }
static VB_INLINE float most(F v) { return vmaxvq_f32(v); }
static VB_INLINE I minus(I x, int y) { return vsubq_s32(x, vdupq_n_s32(y)); }
static VB_INLINE void put_bytes(uint8_t* out, int16x8_t a, int16x8_t b) {
  const uint8x16_t bytes = vcombine_u8(vqmovun_s16(a), vqmovun_s16(b));
  vst1q_u8(out, veorq_u8(bytes, vdupq_n_u8(OFFSET)));
}
static VB_INLINE void put_bytes(uint8_t* out, I a, I b, I c, I d) {
  put_bytes(out, vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)),
            vcombine_s16(vqmovn_s32(c), vqmovn_s32(d)));
}
static VB_INLINE void put_bytes(uint8_t* out, I a, I b) {
  put_bytes(out, vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
}
static VB_INLINE I alternate(I even, I odd) {
  const uint16x8_t low = vreinterpretq_u16_s32(even), high = vreinterpretq_u16_s32(odd);
  return vreinterpretq_s32_u16(vtrn1q_u16(low, high));
}
static VB_INLINE F even_floats(I pairs) {
  return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16));
}
static VB_INLINE F odd_floats(I pairs) {
  return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(~0xffff)));
}
static VB_INLINE I max_signed(I a, I b) {
  const int16x8_t most = vmaxq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
  return vreinterpretq_s32_s16(most);
}
static VB_INLINE I max_unsigned(I a, I b) {
  const uint16x8_t most = vmaxq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
  return vreinterpretq_s32_u16(most);
}
static VB_INLINE I zeros() { return vdupq_n_s32(0); }
static VB_INLINE uint16_t most_of(I v) { return vmaxvq_u16(vreinterpretq_u16_s32(v)); }
#endif

#if !VB_AVX512
static VB_INLINE I load_part(const BFloat16* p, int64_t count) {
  BFloat16 part[2 * W] = {};
  std::copy_n(p, count, part);
  return load_vector(part);
}
#endif
#endif

}  // namespace linear
