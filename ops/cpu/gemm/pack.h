// The packed layout of linear weights, and the layout that inputs must have.
#pragma once
#include "gemm/problem.h"

#if VB_BFLOAT16 && defined(__AMX_BF16__) && defined(__linux__)
#define VB_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace linear {

// Whether this process may use AMX for products of bfloat16.
#if VB_AMX
// Linux requires a process to request permission.
static bool has_tiles() {
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & amx_bf16) || !(d & amx_tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
}
#else
static bool has_tiles() { return false; }
#endif

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

// [out_features][in_features] → [panels][in_features / I][vectors of the panel][I / G][W][G], padded
// with zeros. The last panel has a single vector if one is enough.
template <int64_t I, int64_t G, class T>
static void pack(const T* weight, int64_t out_features, int64_t in_features, int64_t padded_inputs,
                 T* out) {
  for (int64_t n = 0; n < out_features; n += PANEL) {
    const int64_t vectors = std::min<int64_t>(PANEL, padded(out_features) - n) / W;
    for (int64_t k = 0; k < padded_inputs; k += I) {
      for (int64_t i = 0; i < vectors * W * I; i++, out++) {
        const int64_t vector = i / (W * I), group = i / (W * G) % (I / G);
        const int64_t row = n + vector * W + i / G % W, column = k + G * group + i % G;
        const bool inside = row < out_features && column < in_features;
        *out = inside ? weight[row * in_features + column] : T{};
      }
    }
  }
}

// Floats, whose vectors of one input follow each other, and bfloat16 in tiles of pairs of inputs.
static void pack(const float* weight, int64_t out_features, int64_t in_features, float* out) {
  pack<1, 1>(weight, out_features, in_features, in_features, out);
}
static void pack(const BFloat16* weight, int64_t out_features, int64_t in_features,
                 BFloat16* out) {
  pack<TILE_INPUTS, 2>(weight, out_features, in_features, padded_inputs(weight, in_features), out);
}

}  // namespace linear
