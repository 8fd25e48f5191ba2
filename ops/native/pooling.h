// Means of the windows of a map with channels last, side by side; those at its end may be cut off.
#pragma once
#include <algorithm>
#include <cstdint>
#include "lanes.h"
#include "parallel.h"
#include "simd.h"

namespace pooling {

using simd::F;
using simd::W;

// ops/inference/pooling.py has the same fields in the same order. Strides are in elements, from image
// to image, row to row and pixel to pixel; the result has none.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t stride[3];
  int64_t window[2];
  int64_t bfloat16, threads;
};

constexpr int VECTORS = 4;  // of channels at a time, so that sums need not wait for each other

// The sums of a window's rows are added up, so that few numbers are added to a large one.
template <class T, int N>
static void mean(const Problem& p, const T* in, int64_t rows, int64_t columns, int lanes, T* out) {
  F total[N];
  for (int n = 0; n < N; n++) total[n] = simd::zero();
  for (int64_t y = 0; y < rows; y++) {
    F sum[N];
    for (int n = 0; n < N; n++) sum[n] = simd::zero();
    const T* pixel = in + y * p.stride[1];
    for (int64_t x = 0; x < columns; x++, pixel += p.stride[2]) {
      VB_UNROLL
      for (int n = 0; n < N; n++) {
        sum[n] = sum[n] + simd::get(pixel + n * W, n == N - 1 ? lanes : W);
      }
    }
    for (int n = 0; n < N; n++) total[n] = total[n] + sum[n];
  }
  const F count = simd::set1(static_cast<float>(rows * columns));
  for (int n = 0; n < N; n++) {
    simd::put(out + n * W, total[n] / count, n == N - 1 ? lanes : W);
  }
}

template <class T>
static void forward_of(const Problem& p, const void* in, void* out) {
  const int64_t rows = (p.height + p.window[0] - 1) / p.window[0];
  const int64_t columns = (p.width + p.window[1] - 1) / p.window[1];
  constexpr int64_t step = VECTORS * W;
  const int64_t blocks = (p.channels + step - 1) / step;
  parallel::for_each(p.batch * rows * blocks, p.threads, [&](int64_t index) {
    const int64_t row = index / blocks, channel = index % blocks * step;
    const int64_t image = row / rows, y = row % rows * p.window[0];
    const int64_t height = std::min(p.window[0], p.height - y);
    const T* from = static_cast<const T*>(in) + image * p.stride[0] + y * p.stride[1] + channel;
    T* to = static_cast<T*>(out) + row * columns * p.channels + channel;
    for (int64_t x = 0; x < p.width; x += p.window[1], to += p.channels) {
      const T* window = from + x * p.stride[2];
      const int64_t width = std::min(p.window[1], p.width - x);
      if (channel + step <= p.channels) {
        mean<T, VECTORS>(p, window, height, width, W, to);
        continue;
      }
      for (int64_t c = 0; channel + c < p.channels; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - channel - c));
        mean<T, 1>(p, window + c, height, width, lanes, to + c);
      }
    }
  });
}

static void forward(const Problem& p, const void* in, void* out) {
  p.bfloat16 ? forward_of<BFloat16>(p, in, out) : forward_of<float>(p, in, out);
}

}  // namespace pooling
