// Scales of a global response norm: of each channel, by its norm over a map's pixels.
#pragma once
#include "common/kernel.h"

namespace response {

using simd::F;
using simd::W;

// response_scales.py fills in these fields.
struct Problem {
  int64_t batch, pixels, dim, bfloat16;
  double eps;
  int64_t threads;
};

// `in` is [batch][pixels][dim], `weight` [dim], `out` [batch][dim].
struct Tensors {
  const void* in;
  const float* weight;
  void* out;
};

constexpr int VECTORS = 8;     // of channels at a time, to hide the latency of sums
constexpr int64_t BAND = 256;  // pixels whose squares are summed first, for precision

// out[c] = Σ x[c]² over the pixels, for N vectors.
template <int N, class T>
static void sum_squares(const T* in, int64_t pixels, int64_t dim, int lanes, float* out) {
  F sum[N];
  VB_UNROLL
  for (int n = 0; n < N; n++) sum[n] = simd::zero();
  for (int64_t i = 0; i < pixels; i++, in += dim) {
    VB_UNROLL
    for (int n = 0; n < N; n++) {
      const F x = simd::get(in + n * W, n == N - 1 ? lanes : W);
      sum[n] = simd::fma(x, x, sum[n]);
    }
  }
  VB_UNROLL
  for (int n = 0; n < N; n++) simd::put(out + n * W, sum[n], n == N - 1 ? lanes : W);
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  static thread_local ScratchBuffer<float> buffer;
  const int64_t bands = (p.pixels + BAND - 1) / BAND;
  float* const sums = buffer.of(p.batch * bands * p.dim);
  parallel::for_each(p.batch * bands, p.threads, [&](int64_t item) {
    const int64_t first = item % bands * BAND, pixels = std::min(BAND, p.pixels - first);
    const T* const in =
        static_cast<const T*>(t.in) + (item / bands * p.pixels + first) * p.dim;
    float* const out = sums + item * p.dim;
    int64_t c = 0;
    for (; c + VECTORS * W <= p.dim; c += VECTORS * W) {
      sum_squares<VECTORS>(in + c, pixels, p.dim, W, out + c);
    }
    for (; c < p.dim; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.dim - c));
      sum_squares<1>(in + c, pixels, p.dim, lanes, out + c);
    }
  });
  for (int64_t image = 0; image < p.batch; image++) {
    float* const norms = sums + image * bands * p.dim;
    double total = 0;
    for (int64_t c = 0; c < p.dim; c++) {
      float sum = norms[c];
      for (int64_t band = 1; band < bands; band++) sum += norms[band * p.dim + c];
      norms[c] = std::sqrt(sum);
      total += norms[c];
    }
    const float divisor = static_cast<float>(total / static_cast<double>(p.dim) + p.eps);
    T* const out = static_cast<T*>(t.out) + image * p.dim;
    for (int64_t c = 0; c < p.dim; c++) {
      simd::assign(out + c, 1.f + t.weight[c] * (norms[c] / divisor));
    }
  }
}

}  // namespace response
