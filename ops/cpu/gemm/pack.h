// The packed layout of linear weights, and the layout that inputs must have.
#pragma once
#include <algorithm>
#include "gemm/amx.h"
#include "gemm/problem.h"

namespace linear {

// A tile of bfloat16: its inputs, and its pairs of inputs.
constexpr int64_t TILE_INPUTS = 32, TILE_ROWS = TILE_INPUTS / 2;

// The padded length of copied rows.
static int64_t padded_inputs(const float*, int64_t in_features) { return in_features; }
static int64_t padded_inputs(const BFloat16*, int64_t in_features) {
  return round_up(in_features, TILE_INPUTS);
}

// Whether rows are used in place; others are copied and padded first.
static bool takes_rows_in_place(const float*, int64_t, int64_t) { return true; }
[[maybe_unused]] static bool takes_rows_in_place(const BFloat16*, int64_t in_features,
                                                 int64_t rows) {
  if (!VB_BFLOAT16) return false;
  // Only whole tiles are read.
  if (has_tiles()) return in_features % TILE_INPUTS == 0 && rows >= TILE_ROWS;
  return in_features % INPUTS<BFloat16> == 0;
}

template <class T>
static int64_t packed_size(const T* type, int64_t out_features, int64_t in_features) {
  return padded(out_features) * padded_inputs(type, in_features);
}

// [out_features][in_features] → [panels][in_features][vectors of the panel], padded with zeros. The
// last panel has a single vector if one is enough.
static void pack(const float* weight, int64_t out_features, int64_t in_features, float* out) {
  for (int64_t n = 0; n < out_features; n += PANEL) {
    const int64_t width = std::min<int64_t>(PANEL, padded(out_features) - n);
    for (int64_t k = 0; k < in_features; k++, out += width) {
      for (int64_t j = 0; j < width; j++) {
        out[j] = n + j < out_features ? weight[(n + j) * in_features + k] : 0.f;
      }
    }
  }
}

// [out_features][in_features] → [panels][in_features / 32][tiles of the panel][16][16][2]: the axes
// of a tile are pairs of inputs, outputs, and the two inputs of a pair. Both dimensions are padded
// with zeros.
static void pack(const BFloat16* weight, int64_t out_features, int64_t in_features,
                 BFloat16* out) {
  for (int64_t n = 0; n < out_features; n += PANEL) {
    const int64_t tiles = std::min<int64_t>(PANEL, padded(out_features) - n) / W;
    for (int64_t k = 0; k < in_features; k += TILE_INPUTS) {
      for (int64_t i = 0; i < tiles * W * TILE_INPUTS; i++, out++) {
        const int64_t tile = i / (W * TILE_INPUTS), pair = i / (2 * W) % TILE_ROWS;
        const int64_t row = n + tile * W + i / 2 % W, column = k + 2 * pair + i % 2;
        const bool inside = row < out_features && column < in_features;
        *out = inside ? weight[row * in_features + column] : BFloat16{0};
      }
    }
  }
}

}  // namespace linear
