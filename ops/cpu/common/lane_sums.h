// Sums over the lanes of many vectors.
#pragma once
#include <cstdint>
#include "common/simd.h"

namespace simd {

// Sums W lanes each: [rows][W] → [rows], a multiple of W.
static void sum_lanes(const float* in, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; r += W) {
    const float* lines[W];
    VB_UNROLL
    for (int l = 0; l < W; l++) lines[l] = in + (r + l) * W;
    F columns[W];
    transpose(lines, columns);
    F sum = columns[0];
    VB_UNROLL
    for (int l = 1; l < W; l++) sum = sum + columns[l];
    store(out + r, sum);
  }
}

}  // namespace simd
