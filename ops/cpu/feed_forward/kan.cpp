// Kolmogorov-Arnold layers: layer norm, basis functions around the points of a grid, and a linear
// layer. The basis functions of some rows at a time are computed and multiplied while in the cache.
// https://arxiv.org/abs/2404.19756, https://arxiv.org/abs/2502.13693
#include "common/kernel.h"
#include "gemm/call.h"
#include "norm/norm.h"

namespace kan {

using simd::F;
using simd::W;

// kan.py fills in these fields.
struct Problem {
  int64_t rows, in_features, grids, out_features;
  double eps;    // of the norm
  double scale;  // scale of inputs: 2 / (width ln 2)
  int64_t bfloat16, threads;
};

// `in` is [rows][in_features]; `norm_weight` and `norm_bias` are [in_features]; `powers` [grids]
// are two to the power of grid points times `scale`; `weight` is the packed weight of a linear
// layer from [grid][in_features] to out_features, and `bias` its bias, zeros.
struct Tensors {
  const void* in;
  const float *norm_weight, *norm_bias, *powers;
  const void* weight;
  const float* bias;
  void* out;
};

// The exponent of two at which inputs are clamped; grids reach at most half as far.
constexpr float FAR = 60.f;
constexpr int64_t ROWS = 8;  // normalised at once

static VB_INLINE F clamped(F x, float bound) {
  // NaN is preserved: `max` returns its second argument.
  x = simd::max(simd::set1(-bound), x);
  return simd::zero() - simd::max(simd::set1(-bound), simd::zero() - x);
}

// One row: 1 - tanh²(u) = 4 e / (1 + e)² with e = exp(-2 u), u the distance from a grid point in
// widths.
template <class T>
static void bump(const Problem& p, const Tensors& t, const float* normed, T* out) {
  const float high = static_cast<float>(p.scale), low = static_cast<float>(p.scale - high);
  const F scale = simd::set1(high), rest = simd::set1(low), ln2 = simd::set1(0.69314718f);
  for (int64_t c = 0; c < p.in_features; c += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, p.in_features - c));
    const F x = clamped(simd::load(normed + c), FAR / high), power = simd::zero() - x * scale;
    // The rounding error of the power, which may be large compared to its distance from the grid
    // point's.
    const F lost = simd::fma(x, scale, power) + x * rest;
    const F rounded = simd::exp2(power), e = simd::fma(rounded * ln2, simd::zero() - lost, rounded);
    T* place = out + c;
    for (int64_t g = 0; g < p.grids; g++, place += p.in_features) {
      const F at = e * simd::set1(t.powers[g]);
      const F half = simd::reciprocal(simd::fma(simd::set1(0.5f), at, simd::set1(0.5f)));
      simd::put(place, at * half * half, lanes);
    }
  }
}

template <class T>
static void run(const Problem& p, const Tensors& t, int64_t begin, int64_t end) {
  static thread_local ScratchBuffer<T> bumps_buffer;
  static thread_local ScratchBuffer<float> normed_buffer;
  const int64_t features = p.grids * p.in_features;
  T* const bumps = bumps_buffer.of((end - begin) * features);
  float* const normed = normed_buffer.of(ROWS * p.in_features + W);
  const norm::Norm<float> norm{p.in_features, t.norm_weight, t.norm_bias,
                               static_cast<float>(p.eps)};
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t count = std::min(ROWS, end - first);
    norm::normalise(norm, static_cast<const T*>(t.in) + first * p.in_features, count, normed);
    for (int64_t r = 0; r < count; r++) {
      bump(p, t, normed + r * p.in_features, bumps + (first - begin + r) * features);
    }
  }
  linear::map_rows(bumps, end - begin, features, t.weight, t.bias, p.out_features,
                   activation::NONE, static_cast<T*>(t.out) + begin * p.out_features);
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t row_bytes = p.grids * p.in_features * int64_t{sizeof(T)};
  const int64_t fitting = std::max(linear::MIN_CHUNK, linear::CHUNK_BYTES / row_bytes);
  const int64_t tasks = std::max((p.rows + fitting - 1) / fitting, std::min(p.rows, p.threads));
  const auto work = [&](int64_t i) {
    run<T>(p, t, p.rows * i / tasks, p.rows * (i + 1) / tasks);
  };
  parallel::for_each(tasks, p.threads, work);
}

}  // namespace kan

// The C interface, called from kan.py.
extern "C" int kan_forward(const kan::Problem* problem, const kan::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    kan::forward<decltype(type)>(*problem, *tensors);
  });
}
