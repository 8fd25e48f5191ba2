// Maxima or means of windows of a channels-last map, which may overlap and reach over its border.
#include "common/kernel.h"

namespace window_pool {

using simd::F;
using simd::W;

// window_pool.py fills in these fields. Strides of the map are in elements, for image, row and
// pixel; the result is contiguous.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t map_stride[3];
  int64_t window[2], stride[2], padding[2];
  int64_t rows, columns;         // of the result
  int64_t means, counts_padding;  // means instead of maxima; divided also by pixels of the padding
  int64_t bfloat16, threads;
};

template <int N>
using Constant = std::integral_constant<int, N>;
constexpr int VECTORS = 4;  // of channels at a time, to hide latencies

// The part of a window inside the map, along one axis, and its length with the padding.
struct Side {
  int64_t begin, count, padded;
};

static Side side_of(const Problem& p, int axis, int64_t index) {
  const int64_t size = axis ? p.width : p.height;
  const int64_t first = index * p.stride[axis] - p.padding[axis];
  const int64_t end = std::min(first + p.window[axis], size + p.padding[axis]);
  const int64_t begin = std::max<int64_t>(first, 0);
  return {begin, std::min(end, size) - begin, end - first};
}

// NaN if either is.
static VB_INLINE F larger(F a, F b) {
#if VB_AVX512
  return _mm512_or_ps(simd::max(a, b), simd::max(b, a));
#elif VB_AVX2
  return _mm256_or_ps(simd::max(a, b), simd::max(b, a));
#elif VB_NEON
  return simd::max(a, b);
#else
  return (a > b) | (a != a) ? a : b;
#endif
}

// N vectors of channels of a window, the last one with `lanes`.
template <bool MEANS, int N, class T>
static VB_INLINE void pool(const Problem& p, const T* in, int64_t rows, int64_t columns, F divisor,
                           int lanes, T* out) {
  F r[N];
  VB_UNROLL
  for (int n = 0; n < N; n++) {
    r[n] = MEANS ? simd::zero() : simd::get(in + n * W, n == N - 1 ? lanes : W);
  }
  for (int64_t y = 0; y < rows; y++) {
    const T* pixel = in + y * p.map_stride[1];
    for (int64_t x = 0; x < columns; x++, pixel += p.map_stride[2]) {
      VB_UNROLL
      for (int n = 0; n < N; n++) {
        const F seen = simd::get(pixel + n * W, n == N - 1 ? lanes : W);
        r[n] = MEANS ? r[n] + seen : larger(r[n], seen);
      }
    }
  }
  VB_UNROLL
  for (int n = 0; n < N; n++) {
    simd::put(out + n * W, MEANS ? r[n] / divisor : r[n], n == N - 1 ? lanes : W);
  }
}

template <bool MEANS, class T>
static void forward(const Problem& p, const T* in, T* out) {
  parallel::for_each(p.batch * p.rows, p.threads, [&](int64_t index) {
    const Side y = side_of(p, 0, index % p.rows);
    const T* row = in + index / p.rows * p.map_stride[0] + y.begin * p.map_stride[1];
    for (int64_t i = 0; i < p.columns; i++) {
      const Side x = side_of(p, 1, i);
      const T* const window = row + x.begin * p.map_stride[2];
      T* const to = out + (index * p.columns + i) * p.channels;
      const int64_t count = p.counts_padding ? y.padded * x.padded : y.count * x.count;
      const F divisor = simd::set1(static_cast<float>(count));
      const auto pool_at = [&](auto vectors, int64_t c, int lanes) {
        pool<MEANS, vectors()>(p, window + c, y.count, x.count, divisor, lanes, to + c);
        return c + vectors() * W;
      };
      int64_t c = 0;
      while (c + VECTORS * W <= p.channels) c = pool_at(Constant<VECTORS>(), c, W);
      if (c + 2 * W <= p.channels) c = pool_at(Constant<2>(), c, W);
      if (c + W <= p.channels) c = pool_at(Constant<1>(), c, W);
      if (c == p.channels) continue;
      // Rather some channels twice than a vector that isn't full.
      const int64_t last = std::max<int64_t>(0, p.channels - W);
      pool_at(Constant<1>(), last, static_cast<int>(p.channels - last));
    }
  });
}

}  // namespace window_pool

// The C interface, called from window_pool.py.
extern "C" int window_pool_forward(const window_pool::Problem* problem, const void* in,
                                   void* out) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    const T* const from = static_cast<const T*>(in);
    T* const to = static_cast<T*>(out);
    problem->means ? window_pool::forward<true>(*problem, from, to)
                   : window_pool::forward<false>(*problem, from, to);
  });
}
