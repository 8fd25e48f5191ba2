// Means of adjacent windows of a channels-last map; windows at its end may be cut off.
#include "common/kernel.h"

namespace pooling {

using simd::F;
using simd::W;

// window_means.py fills in these fields. Strides are in elements, for image, row and pixel; the
// result is contiguous.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t stride[3];
  int64_t window[2];
  int64_t bfloat16, threads;
};

constexpr int VECTORS = 4;  // of channels at a time, to hide the latency of additions

// Window rows per task. Threads split rows rather than channels: cache lines that several threads
// have read are slow to write.
constexpr int64_t BAND = 8;

// N vectors of a window's mean, or of its sum if `count` is 1. Rows are summed separately first,
// for precision.
template <int N, class T, class Out>
static void mean(const Problem& p, const T* in, int64_t rows, int64_t columns, int64_t count,
                 int lanes, Out* out) {
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
  const F divisor = simd::set1(static_cast<float>(count));
  for (int n = 0; n < N; n++) {
    simd::put(out + n * W, total[n] / divisor, n == N - 1 ? lanes : W);
  }
}

// The same for all channels of a window.
template <class T, class Out>
static void pool(const Problem& p, const T* in, int64_t rows, int64_t columns, int64_t count,
                 Out* out) {
  constexpr int64_t step = VECTORS * W;
  int64_t c = 0;
  for (; c + step <= p.channels; c += step) {
    mean<VECTORS>(p, in + c, rows, columns, count, W, out + c);
  }
  for (; c < p.channels; c += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - c));
    mean<1>(p, in + c, rows, columns, count, lanes, out + c);
  }
}

template <class T>
static void forward(const Problem& p, const T* in, T* out) {
  static thread_local ScratchBuffer<float> buffer;
  const int64_t rows = (p.height + p.window[0] - 1) / p.window[0];
  const int64_t columns = (p.width + p.window[1] - 1) / p.window[1];
  const int64_t bands = (std::min(p.window[0], p.height) + BAND - 1) / BAND;
  const int64_t size = columns * p.channels;
  float* const sums = bands > 1 ? buffer.of(p.batch * rows * bands * size) : nullptr;
  const auto columns_of = [&](int64_t x) { return std::min(p.window[1], p.width - x); };
  const auto rows_of = [&](int64_t row) {
    return std::min(p.window[0], p.height - row % rows * p.window[0]);
  };
  parallel::for_each(p.batch * rows * bands, p.threads, [&](int64_t index) {
    const int64_t row = index / bands, first = index % bands * BAND;
    const int64_t height = std::clamp<int64_t>(rows_of(row) - first, 0, BAND);
    const T* from = in + row / rows * p.stride[0] + (row % rows * p.window[0] + first) * p.stride[1];
    for (int64_t i = 0; i < columns; i++) {
      const int64_t x = i * p.window[1], width = columns_of(x);
      const T* window = from + x * p.stride[2];
      if (sums) {
        pool(p, window, height, width, 1, sums + index * size + i * p.channels);
      } else {
        pool(p, window, height, width, height * width, out + row * size + i * p.channels);
      }
    }
  });
  for (int64_t row = 0; sums && row < p.batch * rows; row++) {
    const Problem of_bands{1, bands, 1, p.channels, {0, size, size}, {bands, 1}, 0, 1};
    for (int64_t i = 0; i < columns; i++) {
      const int64_t count = rows_of(row) * columns_of(i * p.window[1]), at = i * p.channels;
      pool(of_bands, sums + row * bands * size + at, bands, 1, count, out + row * size + at);
    }
  }
}

}  // namespace pooling

// The C interface, called from window_means.py.
extern "C" int pooling_forward(const pooling::Problem* problem, const void* in, void* out) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    pooling::forward(*problem, static_cast<const T*>(in), static_cast<T*>(out));
  });
}
