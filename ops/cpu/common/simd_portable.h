// The vectors of simd.h with the vector extensions of GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>

namespace simd {

constexpr int W = 4;
constexpr bool HAS_PERMUTE = false;
constexpr int REGISTERS = 16;
typedef float F __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t I __attribute__((vector_size(4 * sizeof(int32_t))));
static VB_INLINE F set1(float x) { return F{x, x, x, x}; }
static VB_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static VB_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
static VB_INLINE F fma(F a, F b, F c) { return a * b + c; }
// Whole vectors rather than loops over lanes, which compilers leave as they are in long functions.
static VB_INLINE F max(F a, F b) { return a > b ? a : b; }
static VB_INLINE F min(F a, F b) { return a < b ? a : b; }
static VB_INLINE F round(F x) {
  const F magic =
      set1(12582912.f);  // 1.5 * 2^23: adding it leaves no fractional bits, for |x| < 2^22
  return (x + magic) - magic;
}
static VB_INLINE F of_bits(I bits) {
  F x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
static VB_INLINE F times_power_of_two(F x, F n) {
  return x * of_bits((__builtin_convertvector(n, I) + 127) << 23);
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  uint16_t half __attribute__((vector_size(4 * sizeof(uint16_t))));
  std::memcpy(&half, p, sizeof half);
  return of_bits(__builtin_convertvector(half, I) << 16);
}
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
static VB_INLINE void store_from_float(BFloat16* p, F v) {
  float lanes[W];
  store(lanes, v);
  for (int l = 0; l < W; l++) assign(p + l, lanes[l]);
}
static VB_INLINE void stream(float* p, F v) { store(p, v); }
static VB_INLINE void stream(BFloat16* p, F v) { store_from_float(p, v); }
static VB_INLINE void end_streams() {}
static VB_INLINE void transpose(const float* const (&rows)[W], F (&r)[W]) {
  for (int i = 0; i < W; i++) {
    for (int l = 0; l < W; l++) r[i][l] = rows[l][i];
  }
}

}  // namespace simd
