// Rotation of channel pairs by the row and column of their pixel.
#pragma once
#include <cstdint>
#include "common/simd.h"

namespace rotation {

using simd::F;
using simd::W;

// Cosines, then sines (negated for even channels): [rows or columns][2][dim / 2]. The first half of
// the channels is rotated by the row, the second by the column.
struct Tables {
  const float *row, *column;
  int64_t width;  // of the map
  int dim;        // a multiple of 2 W
};

static VB_INLINE F swap_pairs(F x) {
#if VB_AVX512
  return _mm512_permute_ps(x, 0xB1);
#elif VB_AVX2
  return _mm256_permute_ps(x, 0xB1);
#elif VB_NEON
  return vrev64q_f32(x);
#else
  F r;
  for (int l = 0; l < W; l++) r[l] = x[l ^ 1];
  return r;
#endif
}

// Rotates `in` for the token and multiplies it by a factor; `out` may be `in`.
static VB_INLINE void rotate(const Tables& tables, const float* in, int64_t token, F factor,
                             float* out) {
  const int half = tables.dim / 2;
  const float* row = tables.row + token / tables.width * tables.dim;
  const float* column = tables.column + token % tables.width * tables.dim;
  for (int c = 0; c < tables.dim; c += W) {
    const float* table = c < half ? row + c : column + c - half;
    const F x = simd::load(in + c) * factor;
    const F across = swap_pairs(x) * simd::load(table + half);
    simd::store(out + c, simd::fma(x, simd::load(table), across));
  }
}

}  // namespace rotation
