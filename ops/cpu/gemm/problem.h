// What a linear layer is asked for, in the terms that its callers and its micro-kernels share.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include "common/activation.h"
#include "common/prefetch.h"
#include "common/simd.h"

namespace linear {

using memory::LINE;
using simd::F;
using simd::round_up;
using simd::W;

// plan.py reads the fields from here. Strides are from row to row, in elements.
struct Problem {
  int64_t rows, in_features, out_features, in_stride, out_stride, other_stride;
  int64_t image_rows;  // that share their scales and energies
  int64_t activation, combination, bfloat16, threads;
};

// The order is that of COMBINATIONS in plan.py: after the activation, what is done with
// `other`.
enum Combination : int64_t { NONE, ADD, MULTIPLY, ADD_SCALED };

// `weight` as `pack` gives it, `bias` [out_features]. Null where it is not wanted: `other`
// [rows][out_features], `scale` [images][in_features], by which inputs are multiplied, and `energy`
// [images][out_features], which receives the sums of squared outputs; `other_scale` [out_features]
// is what `other` is multiplied by before it is added. T is float or BFloat16.
struct Tensors {
  const void* in;
  const void* weight;
  const float* bias;
  const void* other;
  const float* scale;
  void* out;
  float* energy;
  const float* other_scale;
};

// What is multiplied in a layer of T: floats, where the CPU has no products of bfloat16.
template <class T>
using Input = std::conditional_t<VB_BFLOAT16, T, float>;

// A lane's share of one product is as large as a float: a float, or two bfloat16.
template <class T>
constexpr int64_t INPUTS = sizeof(float) / sizeof(T);

constexpr int PANEL = 2 * W;

// Inputs that are read again for every panel; they share a core's second-level cache with a panel.
constexpr int64_t CHUNK_BYTES = 768 * 1024;
constexpr int64_t MIN_CHUNK = 112;

// Outputs with those that fill the last vector.
static int64_t padded(int64_t out_features) { return round_up(out_features, W); }

// Some of the rows or panels.
struct Range {
  int64_t begin, end;
};

static Range share(int64_t count, int64_t index, int64_t shares) {
  return {count * index / shares, count * (index + 1) / shares};
}

}  // namespace linear
