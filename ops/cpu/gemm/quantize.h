// The operands of linear layers in int8: the packed layout of weights, and quantised rows.
#pragma once
#include "gemm/bytes.h"
#include "gemm/pack.h"

namespace linear {

constexpr int64_t GROUP = 4;         // inputs of a lane per product
constexpr int64_t BYTE_INPUTS = 64;  // of a tile of weights

static int64_t padded_bytes(int64_t in_features) { return round_up(in_features, BYTE_INPUTS); }

// Elements of a packed weight.
[[maybe_unused]] static int64_t packed_bytes(int64_t out_features, int64_t in_features) {
  return padded(out_features) * padded_bytes(in_features);
}

// In tiles of 64 inputs or, without tiles, in vectors, both in groups.
[[maybe_unused]] static void pack(const int8_t* weight, int64_t out_features, int64_t in_features,
                                  int8_t* out) {
  const auto packed = has_tiles() ? pack<BYTE_INPUTS, GROUP, int8_t> : pack<GROUP, GROUP, int8_t>;
  packed(weight, out_features, in_features, padded_bytes(in_features), out);
}

#if VB_BYTES
// Rows of bytes: x = scale · (byte - zero).
struct Bytes {
  const uint8_t* in;
  int64_t stride, in_features;  // whole groups
  const float *scale, *shift;   // per row; shift is scale · zero
};

constexpr float LEAST_STEP = std::numeric_limits<float>::min();  // whose inverse is finite
constexpr int64_t AT_ONCE = 4 * W;  // values quantised at a time

template <class T>
static VB_INLINE F scaled_input(const T* in, const float* scale, int lanes) {
  const F x = simd::get(in, lanes);
  return scale ? x * simd::get(scale, lanes) : x;
}

// The smallest and the largest value of a row, and of zero. One is NaN if the row has infinities or
// NaN.
struct Limits {
  float low, high;
};

// Rows whose scales are found together, as vectors.
constexpr int64_t ROWS_AT_ONCE = 16;

// x = step · (byte - zero), for each row.
struct ByteRanges {
  float step[ROWS_AT_ONCE], zero[ROWS_AT_ONCE], inverse[ROWS_AT_ONCE];  // of the step; or 0

  ByteRanges(float own_step, float own_zero) {
    std::fill_n(step, ROWS_AT_ONCE, own_step);
    std::fill_n(zero, ROWS_AT_ONCE, own_zero);
    std::fill_n(inverse, ROWS_AT_ONCE, own_step > 0 ? 1 / own_step : 0);
  }

  // The limits take up all bytes. A row with infinities or NaN has a step of NaN, so that all its
  // outputs are NaN.
  explicit ByteRanges(const Limits (&limits)[ROWS_AT_ONCE]) {
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
      // The difference of the largest numbers would be infinite.
      const float difference = limits[r].high / 255 - limits[r].low / 255;
      step[r] = difference < LEAST_STEP ? 0 : difference;
      zero[r] = step[r] > 0 ? std::nearbyint(-limits[r].low / step[r]) : 0;
      inverse[r] = step[r] > 0 ? 1 / step[r] : 0;
    }
  }
};

template <class T>
static VB_INLINE Limits limits_of_floats(const T* in, const float* scale, int64_t count) {
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
  return {least(simd::min(low[0], low[1])),
          most(simd::max(high[0], high[1])) + simd::reduce_add(odd[0] + odd[1])};
}

// Bfloat16 as integers: positive numbers are in order as signed ones, negative ones in reverse as
// unsigned ones. Takes a fifth of the instructions.
static VB_INLINE Limits limits_of_bits(const BFloat16* in, int64_t count) {
  constexpr uint16_t negative = 0x8000, infinity = 0x7f80;
  I low = zeros(), high = zeros();
  int64_t k = 0;
  const auto add = [&](I bits) VB_INLINE_LAMBDA {
    high = max_signed(high, bits);
    low = max_unsigned(low, bits);
  };
  for (; k + 2 * W <= count; k += 2 * W) add(load_vector(in + k));
  if (k < count) add(load_part(in + k, count - k));
  const BFloat16 top{most_of(high)}, bottom{most_of(low)};
  if (top.bits >= infinity || bottom.bits >= (negative | infinity)) {
    return {0, std::numeric_limits<float>::quiet_NaN()};
  }
  return {bottom.bits < negative ? 0 : simd::to_float(bottom), simd::to_float(top)};
}

template <class T>
static VB_INLINE Limits limits_of(const T* in, const float* scale, int64_t count) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!scale) return limits_of_bits(in, count);
  }
  return limits_of_floats(in, scale, count);
}

// Quantises a row; bytes of the padding are those of zero. With `CHECKED`, for a step that is not of
// the row's limits: values may lie outside of the range, and the result is NaN if one is not finite,
// else 0.
template <bool CHECKED, class T>
static float quantise(const T* in, const float* scale, int64_t count, int64_t padded, float inverse,
                      float zero, uint8_t* out) {
  // Adding it leaves integers, rounded to nearest even, in the low bits.
  constexpr float rounding = 0x1.8p23f;
  constexpr int rounding_bits = 0x4b400000;
  const F factor = simd::set1(inverse), shift = simd::set1(rounding + zero);
  const F first = simd::set1(rounding), last = simd::set1(rounding + 255);
  F odd = simd::zero();
  const auto integers = [&](F x) VB_INLINE_LAMBDA {
    const F sum = simd::fma(x, factor, shift);
    if (!CHECKED) return bits_of(sum);
    odd = simd::fma(x, simd::zero(), odd);
    return bits_of(simd::max(simd::min(sum, last), first));
  };
  int64_t k = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!scale) {
      const auto pairs = [&](I x) VB_INLINE_LAMBDA {
        return alternate(integers(even_floats(x)), integers(odd_floats(x)));
      };
      for (; k + AT_ONCE <= count; k += AT_ONCE) {
        put_bytes(out + k, pairs(load_vector(in + k)), pairs(load_vector(in + k + 2 * W)));
      }
      for (; k < padded; k += AT_ONCE) {
        const auto part = [&](int64_t place) {
          return place < count ? load_part(in + place, std::min<int64_t>(2 * W, count - place))
                               : zeros();
        };
        put_bytes(out + k, pairs(part(k)), pairs(part(k + 2 * W)));
      }
    }
  }
  const auto vector_at = [&](int64_t place, int lanes) VB_INLINE_LAMBDA {
    const F x = lanes ? scaled_input(in + place, scale ? scale + place : nullptr, lanes)
                      : simd::zero();
    return minus(integers(x), rounding_bits);
  };
  for (; k + AT_ONCE <= count; k += AT_ONCE) {
    put_bytes(out + k, vector_at(k, W), vector_at(k + W, W), vector_at(k + 2 * W, W),
              vector_at(k + 3 * W, W));
  }
  for (; k < padded; k += AT_ONCE) {
    I part[4];
    for (int i = 0; i < 4; i++) {
      const int64_t left = std::clamp<int64_t>(count - k - i * W, 0, W);
      part[i] = vector_at(k + i * W, static_cast<int>(left));
    }
    put_bytes(out + k, part[0], part[1], part[2], part[3]);
  }
  return CHECKED ? simd::reduce_add(odd) : 0;
}

#endif

}  // namespace linear
