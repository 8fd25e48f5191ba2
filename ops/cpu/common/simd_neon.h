// The vectors of simd.h with NEON, which all 64-bit ARM CPUs have.
#pragma once
#include <arm_neon.h>
#include <cstdint>
#include <cstring>

namespace simd {

constexpr int W = 4;
constexpr bool HAS_PERMUTE = true;
constexpr int REGISTERS = 32;
using F = float32x4_t;
static VB_INLINE F set1(float x) { return vdupq_n_f32(x); }
// A type that may alias any memory.
template <class V>
static VB_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static VB_INLINE F load(const float* p) { return read<F>(p); }
static VB_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
static VB_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
static VB_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
static VB_INLINE F min(F a, F b) { return vminq_f32(a, b); }
static VB_INLINE F round(F x) { return vrndnq_f32(x); }
static VB_INLINE F times_power_of_two(F x, F n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
static VB_INLINE F widened(uint16x4_t bf16) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bf16), 16));
}
static VB_INLINE F load_bf16(const BFloat16* p) {
  return widened(read<uint16x4_t>(p));
}
static VB_INLINE F load_of_pairs(const BFloat16* p, int part) {
  const uint32x4_t pairs = read<uint32x4_t>(p);
  return vreinterpretq_f32_u32(part ? vandq_u32(pairs, vdupq_n_u32(0xffff0000u))
                                    : vshlq_n_u32(pairs, 16));
}
static VB_INLINE uint16x4_t rounded(F v) {
#if VB_BFLOAT16
  return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));  // of the last place, less 1 if even
  asm("" : "+w"(half));  // else GCC 14 makes one instruction of both sums, which adds 0x8000
  const uint16x4_t r = vaddhn_u32(bits, half);
  return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), r, vdup_n_u16(0x7fc0));
#endif
}
// The byte positions of the floats selected by `index` in a table of floats.
static VB_INLINE uint8x16_t places(int32x4_t index) {
  return vreinterpretq_u8_s32(vmlaq_s32(vdupq_n_s32(0x03020100), index, vdupq_n_s32(0x04040404)));
}
static VB_INLINE F permute(F v, const int32_t* index) {
  const uint8x16_t from = places(read<int32x4_t>(index));
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), from));
}
static VB_INLINE F permute(F low, F high, const int32_t* index, int shift) {
  const uint8x16x2_t table = {{vreinterpretq_u8_f32(low), vreinterpretq_u8_f32(high)}};
  const uint8x16_t from = places(vaddq_s32(read<int32x4_t>(index), vdupq_n_s32(shift)));
  return vreinterpretq_f32_u8(vqtbl2q_u8(table, from));
}
static VB_INLINE F gather(const float* p, const int32_t* index) {
  F r = vld1q_dup_f32(p + index[0]);
  r = vld1q_lane_f32(p + index[1], r, 1);
  r = vld1q_lane_f32(p + index[2], r, 2);
  return vld1q_lane_f32(p + index[3], r, 3);
}
static VB_INLINE F keep_below(F v, const int32_t* limit, int at, F other) {
  return vbslq_f32(vcgtq_s32(read<int32x4_t>(limit), vdupq_n_s32(at)), v, other);
}
static VB_INLINE bool all_equal(F a, F b) { return vminvq_u32(vceqq_f32(a, b)) != 0; }
static VB_INLINE void store_from_float(BFloat16* p, F v) {
  const uint16x4_t r = rounded(v);
  std::memcpy(p, &r, sizeof r);
}
static VB_INLINE void stream(float* p, F v) { store(p, v); }
static VB_INLINE void stream(BFloat16* p, F v) { store_from_float(p, v); }
static VB_INLINE void end_streams() {}
static VB_INLINE void transpose(const float* const (&rows)[W], F (&r)[W]) {
  const F a = load(rows[0]), b = load(rows[1]), c = load(rows[2]), d = load(rows[3]);
  const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                    ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                    cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  r[0] = vreinterpretq_f32_f64(vzip1q_f64(ab_even, cd_even));
  r[1] = vreinterpretq_f32_f64(vzip1q_f64(ab_odd, cd_odd));
  r[2] = vreinterpretq_f32_f64(vzip2q_f64(ab_even, cd_even));
  r[3] = vreinterpretq_f32_f64(vzip2q_f64(ab_odd, cd_odd));
}

#if VB_BFLOAT16
// sum + x · y per lane, where each lane of x and y has two bfloat16.
static VB_INLINE F add_pairs(F sum, F x, F y) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_f32(x), vreinterpretq_bf16_f32(y));
}
#endif

}  // namespace simd
