// Layer norm over channels that lie side by side, and an activation after it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#include "activation.h"
#include "lanes.h"
#include "parallel.h"
#include "simd.h"

namespace norm {

using simd::F;
using simd::W;

constexpr int64_t VECTORS = 64;  // of the pixels that are worked on at once
constexpr int64_t MIN_PIXELS = 512;  // of a thread

// ops/norm.py has the same fields in the same order.
struct Problem {
  int64_t pixels, dim;
  int64_t activation, bfloat16;
  double eps;
  int64_t threads;
};

// `in` and `out` [pixels][dim], `weight` and `bias` [dim].
struct Tensors {
  const void* in;
  const float* weight;
  const float* bias;
  void* out;
};

// One pixel into whole vectors of floats; behind its last channel lie zeros. V vectors, or as many
// as it takes where V is 0.
template <int V, class T>
static VB_INLINE void normalise(const T* in, int64_t dim, const float* weight, const float* bias,
                                float eps, F inside, float* out) {
  F kept[V ? V : 1];
  const int64_t vectors = V ? V : (dim + W - 1) / W;
  const int rest = static_cast<int>(dim - (vectors - 1) * W);
  const auto lanes = [&](int64_t v) VB_INLINE_LAMBDA { return v + 1 < vectors ? W : rest; };
  const auto get = [&](int64_t v) VB_INLINE_LAMBDA { return V ? kept[v] : simd::load(out + v * W); };
  const auto put = [&](int64_t v, F x) VB_INLINE_LAMBDA {
    if (V) {
      kept[v] = x;
    } else {
      simd::store(out + v * W, x);
    }
  };
  F sum = simd::zero();
  VB_UNROLL
  for (int64_t v = 0; v < vectors; v++) {
    put(v, simd::get(in + v * W, lanes(v)));
    sum = sum + get(v);
  }
  const float share = 1.f / static_cast<float>(dim);
  const F centre = simd::set1(simd::reduce_add(sum) * share);
  F squares = simd::zero();
  VB_UNROLL
  for (int64_t v = 0; v < vectors; v++) {
    F x = get(v) - centre;
    if (v + 1 == vectors) x = x * inside;
    put(v, x);
    squares = simd::fma(x, x, squares);
  }
  const F factor = simd::set1(1.f / std::sqrt(simd::reduce_add(squares) * share + eps));
  VB_UNROLL
  for (int64_t v = 0; v < vectors; v++) {
    const F scale = simd::get(weight + v * W, lanes(v)), shift = simd::get(bias + v * W, lanes(v));
    simd::store(out + v * W, simd::fma(get(v) * factor, scale, shift));
  }
}

template <int V, class T>
static void run(const Problem& p, const Tensors& t, int64_t begin, int64_t end) {
  static thread_local std::vector<float> normed;
  const int64_t vectors = (p.dim + W - 1) / W, rest = p.dim - (vectors - 1) * W;
  const int64_t at_once = std::max<int64_t>(1, VECTORS / vectors);
  normed.resize(static_cast<size_t>((at_once * vectors + 1) * W));
  // Vectors that lie across lines of the cache would be slow to read again.
  const auto misplaced = reinterpret_cast<uintptr_t>(normed.data()) % (W * sizeof(float));
  float* const first = normed.data() + (misplaced ? W - misplaced / sizeof(float) : 0);
  float lanes[W];
  for (int l = 0; l < W; l++) lanes[l] = l < rest ? 1.f : 0.f;
  const F inside = simd::load(lanes);
  const float eps = static_cast<float>(p.eps);
  for (int64_t i = begin; i < end; i += at_once) {
    const int64_t count = std::min(at_once, end - i);
    const T* in = static_cast<const T*>(t.in) + i * p.dim;
    T* out = static_cast<T*>(t.out) + i * p.dim;
    float* place = first;
    for (int64_t r = 0; r < count; r++, in += p.dim, place += vectors * W) {
      normalise<V>(in, p.dim, t.weight, t.bias, eps, inside, place);
    }
    if (p.activation != activation::NONE) {
      activation::apply(reinterpret_cast<F*>(first), static_cast<int>(count * vectors),
                        p.activation);
    }
    place = first;
    for (int64_t r = 0; r < count; r++, out += p.dim) {
      for (int64_t c = 0; c < p.dim; c += W, place += W) {
        simd::put(out + c, simd::load(place), static_cast<int>(std::min<int64_t>(W, p.dim - c)));
      }
    }
  }
}

template <class T>
static void run(const Problem& p, const Tensors& t, int64_t begin, int64_t end) {
  switch ((p.dim + W - 1) / W) {
    case 1: return run<1, T>(p, t, begin, end);
    case 2: return run<2, T>(p, t, begin, end);
    case 3: return run<3, T>(p, t, begin, end);
    case 4: return run<4, T>(p, t, begin, end);
    default: return run<0, T>(p, t, begin, end);
  }
}

static void forward(const Problem& p, const Tensors& t) {
  const int64_t tasks = std::max<int64_t>(1, std::min(p.threads, p.pixels / MIN_PIXELS));
  const auto work = [&](int64_t index) {
    const int64_t begin = p.pixels * index / tasks, end = p.pixels * (index + 1) / tasks;
    p.bfloat16 ? run<BFloat16>(p, t, begin, end) : run<float>(p, t, begin, end);
  };
  parallel::for_each(tasks, tasks, work);
}

}  // namespace norm
