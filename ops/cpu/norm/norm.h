// Layer norm over dense channels, with a fused activation.
#pragma once
#include "common/kernel.h"
#include "common/activation.h"

namespace norm {

using simd::F;
using simd::W;

constexpr int64_t VALUES = 64 * W;  // per call of an activation

// layer_norm.py fills in these fields.
struct Problem {
  int64_t pixels, dim;
  int64_t activation, bfloat16;
  double eps;
  int64_t threads;
};

// `in` and `out` are [pixels][dim], `weight` and `bias` [dim].
struct Tensors {
  const void* in;
  const float* weight;
  const float* bias;
  void* out;
};

// Normalises pixels of `dim` channels. T, the type of `weight` and `bias` [dim], is float or
// BFloat16.
template <class T>
struct Norm {
  int64_t dim;
  const T* weight;
  const T* bias;
  float eps;
};

// Normalises N pixels together, to hide the latency of their sums. `inside` is 1 in the lanes of
// the last vector that are channels, else 0.
template <int N, class T, class In, class Out>
static VB_INLINE void normalise(const Norm<T>& norm, F inside, const In* in, Out* out) {
  const int64_t dim = norm.dim, last = (dim - 1) / W * W;
  const int rest = static_cast<int>(dim - last);
  const float share = 1.f / static_cast<float>(dim);
  F sum[N], centre[N], factor[N];
  VB_UNROLL
  for (int i = 0; i < N; i++) sum[i] = simd::get(in + i * dim + last, rest);
  for (int64_t c = 0; c < last; c += W) {
    VB_UNROLL
    for (int i = 0; i < N; i++) sum[i] = sum[i] + simd::load_as_float(in + i * dim + c);
  }
  VB_UNROLL
  for (int i = 0; i < N; i++) {
    centre[i] = simd::set1(simd::reduce_add(sum[i]) * share);
    const F x = (simd::get(in + i * dim + last, rest) - centre[i]) * inside;
    sum[i] = x * x;
  }
  for (int64_t c = 0; c < last; c += W) {
    VB_UNROLL
    for (int i = 0; i < N; i++) {
      const F x = simd::load_as_float(in + i * dim + c) - centre[i];
      sum[i] = simd::fma(x, x, sum[i]);
    }
  }
  VB_UNROLL
  for (int i = 0; i < N; i++) {
    factor[i] = simd::set1(1.f / std::sqrt(simd::reduce_add(sum[i]) * share + norm.eps));
  }
  for (int64_t c = 0; c < dim; c += W) {
    const int lanes = c < last ? W : rest;
    const F weight = simd::get(norm.weight + c, lanes), bias = simd::get(norm.bias + c, lanes);
    VB_UNROLL
    for (int i = 0; i < N; i++) {
      const F x = (simd::get(in + i * dim + c, lanes) - centre[i]) * factor[i];
      simd::put(out + i * dim + c, simd::fma(x, weight, bias), lanes);
    }
  }
}

// [pixels][dim] → [pixels][dim], which may be the same memory.
template <class T, class In, class Out>
static void normalise(const Norm<T>& norm, const In* in, int64_t pixels, Out* out) {
  constexpr int N = 4;
  float lanes[W];
  for (int l = 0; l < W; l++) lanes[l] = l <= (norm.dim - 1) % W ? 1.f : 0.f;
  const F inside = simd::load(lanes);
  const Norm<T> own = norm;
  int64_t i = 0;
  for (; i + N <= pixels; i += N) normalise<N>(own, inside, in + i * own.dim, out + i * own.dim);
  for (; i < pixels; i++) normalise<1>(own, inside, in + i * own.dim, out + i * own.dim);
}

template <class T>
static void run(const Problem& p, const Tensors& t, int64_t begin, int64_t end) {
  const Norm<float> norm{p.dim, t.weight, t.bias, static_cast<float>(p.eps)};
  const T* in = static_cast<const T*>(t.in) + begin * p.dim;
  T* out = static_cast<T*>(t.out) + begin * p.dim;
  if (p.activation == activation::NONE) return normalise(norm, in, end - begin, out);
  static thread_local ScratchBuffer<float> buffer;
  const int64_t at_once = std::max<int64_t>(1, VALUES / p.dim);
  float* const normed = buffer.of(at_once * p.dim + W);
  for (int64_t i = begin; i < end; i += at_once) {
    const int64_t pixels = std::min(at_once, end - i), values = pixels * p.dim;
    normalise(norm, in, pixels, normed);
    activation::apply<T>(reinterpret_cast<F*>(normed), static_cast<int>((values + W - 1) / W),
                         p.activation);
    for (int64_t v = 0; v < values; v += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, values - v));
      simd::put(out + v, simd::load(normed + v), lanes);
    }
    in += values;
    out += values;
  }
}

static void forward(const Problem& p, const Tensors& t) {
  const int64_t tasks = std::min(p.threads, p.pixels);
  const auto work = [&](int64_t index) {
    const int64_t begin = p.pixels * index / tasks, end = p.pixels * (index + 1) / tasks;
    p.bfloat16 ? run<BFloat16>(p, t, begin, end) : run<float>(p, t, begin, end);
  };
  parallel::for_each(tasks, tasks, work);
}

}  // namespace norm
