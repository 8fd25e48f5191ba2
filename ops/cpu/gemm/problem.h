// The parameters of a linear layer, shared by callers and micro-kernels.
#pragma once
#include "common/kernel.h"
#include "common/activation.h"

namespace linear {

using ::Range;
using ::share;
using memory::LINE;
using simd::F;
using simd::round_up;
using simd::W;

// problem.py fills in these fields. Strides are between rows, in elements.
struct Problem {
  int64_t rows, in_features, out_features, in_stride, out_stride, other_stride;
  int64_t image_rows;  // rows that share scales and energies
  int64_t activation, combination, bfloat16, threads;
  int64_t half_scale;  // whether `scale` is in bfloat16
};

// How the activated output is combined with `other`, in the order of COMBINATIONS in problem.py.
// ADD_CLIPPED applies the activation, RELU or RELU6, to the sum instead; so does ADD_GATED, which
// multiplies the output by `gate` before.
enum Combination : int64_t { NONE, ADD, MULTIPLY, ADD_SCALED, ADD_CLIPPED, ADD_GATED };

// `weight` is packed by `pack`, `bias` is [out_features]. Null if unused: `other`
// [rows][out_features]; `scale` [images][in_features], float or BFloat16, multiplied with the inputs;
// `energy` [images][out_features], which receives the sums of squared outputs; `other_scale`
// [out_features], multiplied with `other` before it is added; `gate` [images][out_features]. T is
// float or BFloat16.
//
// With `weight_scale` [2][out_features], the weight is one in int8 (int8.h): the scales of outputs,
// and the negative sums of the scaled weights of each. Rows are quantised with the scale and zero of
// `in_range` [2], or each with its own if that is null.
struct Tensors {
  const void* in;
  const void* weight;
  const float* bias;
  const void* other;
  const void* scale;
  void* out;
  float* energy;
  const float* other_scale;
  const float *weight_scale, *in_range;
  const void* gate;
  const uint8_t* bytes;  // rows quantised with `in_range`, instead of `in`
};

// The operand type of a layer of T: float if the CPU has no products of bfloat16.
template <class T>
using Input = std::conditional_t<VB_BFLOAT16, T, float>;

// A lane holds one float or two bfloat16 per product.
template <class T>
constexpr int64_t INPUTS = sizeof(float) / sizeof(T);

constexpr int PANEL = 2 * W;

// Bytes of inputs per block of rows. They are read again for every panel and share the L2 cache with
// it.
constexpr int64_t CHUNK_BYTES = 768 * 1024;
constexpr int64_t MIN_CHUNK = 112;

// The outputs, rounded up to whole vectors.
static int64_t padded(int64_t out_features) { return round_up(out_features, W); }

}  // namespace linear
