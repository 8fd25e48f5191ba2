// Depthwise 3×3 convolution with padding 1, directly from the map. Each pixel of a row is loaded
// once for all outputs of a run that use it. Channels are the inner loop, so that rows are read in
// memory order.
#pragma once
#include "depthwise/depthwise.h"

namespace depthwise {

constexpr int RUN_PIXELS = 8;

// A run of output pixels of one vector of channels in an output row.
template <class T>
struct Square {
  const T* rows[3];      // at the pixel left of the run; null outside the map
  ptrdiff_t pixel;       // input pixel stride in elements
  bool has_first, has_last;  // whether the run's first and last columns are inside the map
  const float* weight;   // [9][channels]
  ptrdiff_t channels;
  const float* bias;     // or null
  T* out;
  ptrdiff_t out_pixel;
  int lanes;
  int64_t activation;
};

template <class T, int R, int SX, bool WHOLE>
static void run_square(const Square<T>& s) {
  constexpr int COLUMNS = (R - 1) * SX + 3;
  const int lanes = WHOLE ? W : s.lanes;
  const auto get = [&](const auto* place) VB_INLINE_LAMBDA {
    return WHOLE ? simd::load_as_float(place) : simd::get(place, lanes);
  };
  const F bias = s.bias ? get(s.bias) : simd::zero();
  F sum[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) sum[r] = bias;
  for (int y = 0; y < 3; y++) {
    const T* in = s.rows[y];
    if (!in) continue;
    F taps[3];
    VB_UNROLL
    for (int k = 0; k < 3; k++) {
      taps[k] = simd::in_register(get(s.weight + (3 * y + k) * s.channels));
    }
    VB_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      if (column == 0 && !s.has_first) continue;
      if (column == COLUMNS - 1 && !s.has_last) continue;
      const F x = simd::in_register(get(in + column * s.pixel));
      VB_UNROLL
      for (int k = 0; k < 3; k++) {
        const int r = (column - k) / SX;
        if (column >= k && (column - k) % SX == 0 && r < R) sum[r] = simd::fma(taps[k], x, sum[r]);
      }
    }
  }
  if (s.activation != activation::NONE) activation::apply<T>(sum, R, s.activation);
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    T* const place = s.out + r * s.out_pixel;
    WHOLE ? simd::store_from_float(place, sum[r]) : simd::put(place, sum[r], lanes);
  }
}

template <class T>
using RunSquare = void (*)(const Square<T>&);

template <class T, int SX, size_t... I>
static RunSquare<T> square_of(int64_t pixels, bool whole, std::index_sequence<I...>) {
  static constexpr RunSquare<T> runs[2][RUN_PIXELS] = {{run_square<T, I + 1, SX, false>...},
                                                       {run_square<T, I + 1, SX, true>...}};
  return runs[whole][pixels - 1];
}

template <class T>
static RunSquare<T> square_of(int64_t pixels, int64_t stride, bool whole) {
  constexpr std::make_index_sequence<RUN_PIXELS> variants;
  return stride == 1 ? square_of<T, 1>(pixels, whole, variants)
                     : square_of<T, 2>(pixels, whole, variants);
}

static bool is_square(const Problem& p) {
  const auto both = [](const int64_t (&n)[2], int64_t value) {
    return n[0] == value && n[1] == value;
  };
  return both(p.kernel, 3) && both(p.padding, 1) && both(p.dilation, 1) && p.stride[1] <= 2;
}

template <class T>
static void convolve_row(const Problem& p, const Tensors& t, int64_t image, int64_t y) {
  const int64_t runs = (p.out_size[1] + RUN_PIXELS - 1) / RUN_PIXELS;
  for (int64_t i = 0; i < runs; i++) {
    const int64_t begin = p.out_size[1] * i / runs, end = p.out_size[1] * (i + 1) / runs;
    const int64_t first = begin * p.stride[1] - 1, last = (end - 1) * p.stride[1] + 1;
    Square<T> s{{}, p.in_stride[2], first >= 0, last < p.size[1], t.weight, p.channels, t.bias,
                nullptr, p.out_stride[2], W, p.activation};
    const RunSquare<T> whole = square_of<T>(end - begin, p.stride[1], true);
    const RunSquare<T> part = square_of<T>(end - begin, p.stride[1], false);
    for (int k = 0; k < 3; k++) {
      const int64_t row = y * p.stride[0] - 1 + k;
      if (row < 0 || row >= p.size[0]) continue;
      s.rows[k] = static_cast<const T*>(t.in) + image * p.in_stride[0] + row * p.in_stride[1] +
                  first * p.in_stride[2];
    }
    s.out = static_cast<T*>(t.out) + image * p.out_stride[0] + y * p.out_stride[1] +
            begin * p.out_stride[2];
    for (int64_t c = 0; c < p.channels; c += W) {
      s.lanes = static_cast<int>(std::min<int64_t>(W, p.channels - c));
      (s.lanes == W ? whole : part)(s);
      for (const T*& row : s.rows) row = row ? row + W : nullptr;
      s.weight += W;
      if (s.bias) s.bias += W;
      s.out += W;
    }
  }
}

// Any window, with the faster of the two methods.
template <class T>
static void forward_any(const Problem& p, const Tensors& t) {
  if (!is_square(p)) return forward<T>(p, t);
  parallel::for_each(p.batch * p.out_size[0], p.threads, [&](int64_t index) {
    convolve_row<T>(p, t, index / p.out_size[0], index % p.out_size[0]);
  });
}

}  // namespace depthwise
