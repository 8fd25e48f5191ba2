// One vector `F` of `W` floats and the few operations that the kernels need, for AVX-512, AVX2 and,
// through the vector extensions of GCC and Clang, everything else. The instruction set is fixed
// when the file is compiled: `build.py` compiles a kernel once per instruction set and picks the
// library that fits the CPU at run time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VB_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define VB_AVX2 1
#include <immintrin.h>
#endif

// Whether this CPU rounds to bfloat16, and multiplies pairs of them.
#if VB_AVX512 && defined(__AVX512BF16__)
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

// ---- basic operations --------------------------------------------------------------------------
#if VB_AVX512
constexpr int W = 16;
constexpr bool HAS_PERMUTE = true;  // lookups in registers cost less than a gather
constexpr int REGISTERS = 32;
using F = __m512;
static VB_INLINE F set1(float x) { return _mm512_set1_ps(x); }
static VB_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
static VB_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
static VB_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static VB_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // `b` where either is NaN
static VB_INLINE F round(F x) { return _mm512_roundscale_ps(x, 0); }
static VB_INLINE F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
static VB_INLINE F widened(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// One of each of W pairs.
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return _mm512_castsi512_ps(part ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))
                                  : _mm512_slli_epi32(pairs, 16));
}
// To bfloat16, to nearest even; NaN stays NaN.
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
// Lane l: v[index[l]].
static VB_INLINE F permute(F v, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), v);
}
// Lane l: table[index[l] + shift], where the 2 W entries of the table are in two registers.
static VB_INLINE F permute(F low, F high, const int32_t* index, int shift) {
  const __m512i i = _mm512_add_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(shift));
  return _mm512_permutex2var_ps(low, i, high);
}
static VB_INLINE F gather(const float* p, const int32_t* index) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
}
// Lane l: v[l] where limit[l] > at, otherwise `other`.
static VB_INLINE F keep_below(F v, const int32_t* limit, int at, F other) {
  const __mmask16 keep = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(limit), _mm512_set1_epi32(at));
  return _mm512_mask_mov_ps(other, keep, v);
}
static VB_INLINE bool all_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) == 0; }

#elif VB_AVX2
constexpr int W = 8;
constexpr bool HAS_PERMUTE = true;
constexpr int REGISTERS = 16;
using F = __m256;
static VB_INLINE F set1(float x) { return _mm256_set1_ps(x); }
static VB_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
static VB_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
static VB_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static VB_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
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
// One of each of W pairs.
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  const __m256i pairs = load_integers(p);
  return _mm256_castsi256_ps(part ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))
                                  : _mm256_slli_epi32(pairs, 16));
}
// To bfloat16, to nearest even; NaN stays NaN.
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

#else
constexpr int W = 4;
constexpr bool HAS_PERMUTE = false;
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
typedef float F __attribute__((vector_size(4 * sizeof(float))));
static VB_INLINE F set1(float x) { return F{x, x, x, x}; }
static VB_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static VB_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
static VB_INLINE F fma(F a, F b, F c) { return a * b + c; }
static VB_INLINE F max(F a, F b) {
  F r;
  for (int l = 0; l < W; l++) r[l] = a[l] > b[l] ? a[l] : b[l];
  return r;
}
static VB_INLINE F round(F x) {
  const F magic =
      set1(12582912.f);  // 1.5 * 2^23: adding it leaves no bits after the point, for |x| < 2^22
  return (x + magic) - magic;
}
static VB_INLINE F times_power_of_two(F x, F n) {
  F r;
  for (int l = 0; l < W; l++) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n[l]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    r[l] = x[l] * power;
  }
  return r;
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  F r;
  for (int l = 0; l < W; l++) {
    const uint32_t bits = static_cast<uint32_t>(p[l].bits) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    r[l] = x;
  }
  return r;
}
// One of each of W pairs.
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  F r;
  for (int l = 0; l < W; l++) {
    const uint32_t bits = static_cast<uint32_t>(p[2 * l + part].bits) << 16;
    std::memcpy(reinterpret_cast<char*>(&r) + l * sizeof bits, &bits, sizeof bits);
  }
  return r;
}
static VB_INLINE F permute(F v, const int32_t* index) {
  F r;
  for (int l = 0; l < W; l++) r[l] = v[index[l]];
  return r;
}
static VB_INLINE F permute(F low, F high, const int32_t* index, int shift) {
  F r;
  for (int l = 0; l < W; l++) {
    const int i = index[l] + shift;
    r[l] = i < W ? low[i] : high[i - W];
  }
  return r;
}
static VB_INLINE F gather(const float* p, const int32_t* index) {
  F r;
  for (int l = 0; l < W; l++) r[l] = p[index[l]];
  return r;
}
static VB_INLINE F keep_below(F v, const int32_t* limit, int at, F other) {
  for (int l = 0; l < W; l++) {
    if (limit[l] <= at) v[l] = other[l];
  }
  return v;
}
static VB_INLINE bool all_equal(F a, F b) {
  for (int l = 0; l < W; l++) {
    if (!(a[l] == b[l])) return false;
  }
  return true;
}
#endif

static VB_INLINE F zero() { return set1(0.f); }
// Infinite numbers become the nearest that are not; NaN stays NaN.
static VB_INLINE F at_most_finite(F x) {
  return zero() - max(set1(-std::numeric_limits<float>::max()), zero() - x);
}
static VB_INLINE F finite(F x) {
  return at_most_finite(max(set1(-std::numeric_limits<float>::max()), x));
}

// To the next multiple.
template <class N>
static constexpr N round_up(N n, int64_t multiple) {
  return static_cast<N>((n + multiple - 1) / multiple * multiple);
}

// v[k] = load(p + k), where 2 W floats can be read from `p` on.
template <size_t... K>
static VB_INLINE void load_run(const float* p, F (&v)[sizeof...(K)], std::index_sequence<K...>) {
#if VB_AVX512
  // All but one of those loads would lie across two cache lines, which takes twice as long.
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + W);
  ((v[K] = _mm512_castsi512_ps(_mm512_alignr_epi32(high, low, K))), ...);
#else
  ((v[K] = load(p + K)), ...);
#endif
}

// Makes the compiler load `v` once and keep it, where it would rather repeat the load as an operand
// of every use.
static VB_INLINE F in_register(F v) {
#if VB_AVX512 || VB_AVX2
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// ---- functions ---------------------------------------------------------------------------------
// 2^x for x <= 0 with a relative error below 2.2e-7 (minimax polynomial on [-0.5, 0.5]). Below -126
// it gives 2^-126, which vanishes beside the largest term of a softmax; NaN stays NaN.
static VB_INLINE F exp2(F x) {
  x = max(set1(-126.f), x);
  const F n = round(x), f = x - n;
  F p = fma(set1(1.3276471993e-3f), f, set1(9.6755413345e-3f));
  p = fma(p, f, set1(5.5507132735e-2f));
  p = fma(p, f, set1(2.4022119724e-1f));
  p = fma(p, f, set1(6.9314696706e-1f));
  p = fma(p, f, set1(1.f));
  return times_power_of_two(p, n);
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
// [0.7, 1.4], then the odd series of log((1 + t) / (1 - t)).
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

static VB_INLINE void store_from_float(float* p, F v) { store(p, v); }
static VB_INLINE void store_from_float(BFloat16* p, F v) {
#if VB_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v));
#elif VB_AVX2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(v));
#else
  float lanes[W];
  store(lanes, v);
  for (int l = 0; l < W; l++) assign(p + l, lanes[l]);
#endif
}

// A store past the caches, which does not fetch first what it overwrites: for whole cache lines that
// nobody reads soon. `p` is aligned to a vector's size in memory.
static VB_INLINE void stream(float* p, F v) {
#if VB_AVX512
  _mm512_stream_ps(p, v);
#elif VB_AVX2
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
static VB_INLINE void stream(BFloat16* p, F v) {
#if VB_AVX512
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded(v));
#else
  store_from_float(p, v);
#endif
}
// Other threads see what this one has streamed.
static VB_INLINE void end_streams() {
#if VB_AVX512 || VB_AVX2
  _mm_sfence();
#endif
}

// ---- transposition -----------------------------------------------------------------------------
// r[i][l] = rows[l][i]
static VB_INLINE void transpose(const float* const (&rows)[W], F (&r)[W]) {
#if VB_AVX512
  // Each register takes the same four columns of lanes l, l+4, l+8, l+12, so that two rounds of
  // unpacking finish it.
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
#elif VB_AVX2
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
#else
  for (int i = 0; i < W; i++) {
    for (int l = 0; l < W; l++) r[i][l] = rows[l][i];
  }
#endif
}

// out[i * out_pitch + l] = rows[l][i] * scale for l in 0..W-1 and i in 0..count-1, count <= W. Reads
// W elements of each row.
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

// The same for rows that lie `in_pitch` apart.
static VB_INLINE void transpose(const float* in, size_t in_pitch, float* out, size_t out_pitch,
                                int count) {
  const float* rows[W];
  VB_UNROLL
  for (int l = 0; l < W; l++) rows[l] = in + l * in_pitch;
  transpose(rows, out, out_pitch, count);
}

}  // namespace simd
