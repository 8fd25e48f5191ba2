// Depthwise 3×3, 5×5 and 7×7 convolutions that read the map in place. Each pixel of a row is loaded
// once for all outputs of a run that use it.
#pragma once
#include "common/dot.h"
#include "depthwise/depthwise.h"

namespace depthwise {

constexpr int RUN_PIXELS = 8;
// Output rows per task, which find most of their inputs in the L2 cache.
constexpr int64_t BAND_ROWS = 8, BAND_BYTES = 640 * 1024;
// Pixels that are multiples of this far apart share few sets of the L1 cache.
constexpr int64_t CONFLICT_BYTES = 1024;

// Taps [rows][kernel][stride]; a row holds pairs of the window's rows, the last of one and zeros, if
// products are of pairs.
struct Taps {
  const float* weight;
  ptrdiff_t stride;
};

template <class T>
constexpr int TAP_ROWS = simd::Products<T>::COUNT;

// The taps [kernel²][stride] of some channels, in `buffer` if they have to be packed.
template <class T>
static Taps taps_of(const float* weight, ptrdiff_t stride, int64_t channels, int64_t kernel,
                    ScratchBuffer<float>& buffer) {
#if VB_PAIRS
  if (TAP_ROWS<T> == 2 && channels >= W) {
    const int64_t rows = (kernel + 1) / 2, width = simd::round_up(channels, W);
    float* out = buffer.of(rows * kernel * width);
    const Taps taps{out, width};
    for (int64_t y = 0; y < kernel; y += 2) {
      for (int64_t x = 0; x < kernel; x++) {
        const float* const first = weight + (y * kernel + x) * stride;
        const float* const second = y + 1 < kernel ? first + kernel * stride : nullptr;
        for (int64_t c = 0; c < channels; c += W, out += W) {
          const int lanes = static_cast<int>(std::min<int64_t>(W, channels - c));
          const F below = second ? simd::get(second + c, lanes) : simd::zero();
          simd::store(out, simd::Pairs::pack(simd::get(first + c, lanes), below));
        }
      }
    }
    return taps;
  }
#endif
  return {weight, stride};
}

// A run of output pixels of some vectors of channels in an output row.
template <class T>
struct DirectRun {
  const T* in;             // at the run's first row and column, which may be outside the map
  ptrdiff_t row, pixel;    // strides of the input
  Range rows, columns;     // of the window's rows and the run's columns, those inside the map
  Taps taps;
  const float* bias;       // or null
  T* out;
  ptrdiff_t out_pixel;
  int lanes;
  int64_t activation;
  float* total;  // whose vectors grow by the outputs, or null
};

// R outputs of V vectors of channels of a K×K window with column stride SX.
template <class T, int K, int R, int SX, int V, bool WHOLE>
static void convolve_run(const DirectRun<T>& s) {
  using Product = std::conditional_t<WHOLE, simd::Products<T>, simd::Floats>;
  constexpr int COLUMNS = (R - 1) * SX + K, MARGIN = K / 2;
  const int lanes = WHOLE ? W : s.lanes;
  const auto get = [&](const auto* place) VB_INLINE_LAMBDA {
    return WHOLE ? simd::load_as_float(place) : simd::get(place, lanes);
  };
  F sum[V * R];
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const F bias = s.bias ? get(s.bias + v * W) : simd::zero();
    VB_UNROLL
    for (int r = 0; r < R; r++) sum[v * R + r] = bias;
  }
  // Adds the products of a row of taps, by `tap(weight)`, with `pixel(place, x)`.
  const auto add = [&](int64_t y, auto tap, auto pixel) VB_INLINE_LAMBDA {
    const T* in = s.in + y * s.row;
    const float* weight = s.taps.weight + y / Product::COUNT * K * s.taps.stride;
    F taps[K][V];
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) {
        taps[k][v] = simd::in_register(tap(weight + k * s.taps.stride + v * W));
      }
    }
    VB_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      if (column < MARGIN && column < s.columns.begin) continue;
      if (column >= COLUMNS - MARGIN && column >= s.columns.end) continue;
      F x[V];
      pixel(in + column * s.pixel, x);
      VB_UNROLL
      for (int v = 0; v < V; v++) x[v] = simd::in_register(x[v]);
      VB_UNROLL
      for (int k = 0; k < K; k++) {
        const int r = (column - k) / SX;
        if (column < k || (column - k) % SX || r >= R) continue;
        VB_UNROLL
        for (int v = 0; v < V; v++) Product::add_product(sum[v * R + r], taps[k][v], x[v]);
      }
    }
  };
  for (int64_t y = s.rows.begin; y < s.rows.end; y++) {
    if constexpr (Product::COUNT == 1) {
      add(y, get, [&](const T* place, F(&x)[V]) VB_INLINE_LAMBDA { x[0] = get(place); });
    } else if (y % 2 == 0 && y + 1 < s.rows.end) {
      add(y, [](const float* tap) VB_INLINE_LAMBDA { return simd::load(tap); },
          [&](const T* place, F(&x)[V])
              VB_INLINE_LAMBDA { Product::pack(place, place + s.row, x); });
      y++;
    } else {
      const bool second = y % 2;
      add(y,
          [&](const float* tap) VB_INLINE_LAMBDA {
            return second ? Product::without_first(simd::load(tap)) : simd::load(tap);
          },
          [](const T* place, F(&x)[V]) VB_INLINE_LAMBDA { Product::pack(place, x); });
    }
  }
  if (activation::is_clip(s.activation)) {
    const F limit = activation::clip_limit(s.activation);
    VB_UNROLL
    for (int i = 0; i < V * R; i++) sum[i] = activation::clip(sum[i], limit);
  } else if (s.activation != activation::NONE) {
    activation::apply<T>(sum, V * R, s.activation);
  }
  for (int v = 0; WHOLE && s.total && v < V; v++) {
    F total = sum[v * R];
    VB_UNROLL
    for (int r = 1; r < R; r++) total = total + sum[v * R + r];
    simd::store(s.total + v * W, simd::load(s.total + v * W) + total);
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    T* const place = s.out + r * s.out_pixel;
    if (V == 2) {
      simd::store_two(place, sum[r], sum[R * (V - 1) + r]);
    } else {
      WHOLE ? simd::store_from_float(place, sum[r]) : simd::put(place, sum[r], lanes);
    }
  }
}

template <class T>
using ConvolveRun = void (*)(const DirectRun<T>&);

// With fewer channels than a vector, WHOLE is false and the window 3×3.
template <class T, int V, bool WHOLE>
static ConvolveRun<T> direct_of(int64_t kernel, int64_t stride, int64_t pixels) {
  static constexpr auto runs = variants<WHOLE ? 3 : 1>([](auto margin) {
    return variants<2>([](auto step) {
      return variants<RUN_PIXELS>([](auto r) {
        constexpr int K = 2 * decltype(margin)::value + 1;
        return convolve_run<T, K, r.value, decltype(step)::value, V, WHOLE>;
      });
    });
  });
  return runs[WHOLE ? kernel / 2 - 1 : 0][stride - 1][pixels - 1];
}

// Part of a map whose borders are padded with `kernel / 2` zeros.
template <class T>
struct Part {
  const T* in;             // at the first of `rows` and `columns`, those of the input that are there
  Range rows, columns;
  ptrdiff_t in_row, in_pixel;
  Taps taps;
  const float* bias;       // or null
  T* out;                  // at the first output row and column
  ptrdiff_t out_row, out_pixel;
  int64_t channels, kernel, stride[2], activation;
  // Channels per pass over the rows. With a cache line of them, the next output row finds its
  // inputs in the L1 cache; with all of them, rows are read in memory order.
  int64_t pass;
  // The sums of the outputs of each vector, [vectors][W], to which those of this part are added; or
  // null.
  float* totals;
};

// The values in a cache line.
template <class T>
constexpr int64_t LINE_VALUES = memory::LINE / int64_t{sizeof(T)};

// Some rows and columns of the output. With an incomplete last vector of channels, the one before
// is computed twice in part.
template <bool WHOLE, class T>
static void convolve_part(const Part<T>& p, Range rows, Range columns) {
  const int64_t margin = p.kernel / 2, width = length(columns);
  const int64_t runs = (width + RUN_PIXELS - 1) / RUN_PIXELS;
  const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels));
  DirectRun<T> s{nullptr, p.in_row,    p.in_pixel, {},           {},     p.taps, nullptr,
                 nullptr, p.out_pixel, lanes,      p.activation, nullptr};
  // The sums of one vector would wait for the products of pairs before.
  constexpr int VECTORS = WHOLE ? TAP_ROWS<T> : 1;
  for (int64_t c = 0; c < p.channels; c += p.pass) {
    for (int64_t y = rows.begin; y < rows.end; y++) {
      const int64_t top = y * p.stride[0] - margin;
      s.rows = {std::max<int64_t>(0, p.rows.begin - top), std::min(p.kernel, p.rows.end - top)};
      for (int64_t i = 0; i < runs; i++) {
        const Range run = share(width, i, runs);
        const int64_t left = (columns.begin + run.begin) * p.stride[1] - margin;
        const ConvolveRun<T> convolve_run =
            direct_of<T, 1, WHOLE>(p.kernel, p.stride[1], length(run));
        const ConvolveRun<T> convolve_all =
            direct_of<T, VECTORS, WHOLE>(p.kernel, p.stride[1], length(run));
        s.columns = {p.columns.begin - left, p.columns.end - left};
        const T* const in = p.in + (top - p.rows.begin) * p.in_row +
                            (left - p.columns.begin) * p.in_pixel;
        T* const out = p.out + (y - rows.begin) * p.out_row + run.begin * p.out_pixel;
        const int64_t end = std::min(c + p.pass, p.channels);
        for (int64_t v = c, vectors; v < end; v += vectors * W) {
          vectors = v + VECTORS * W <= end ? VECTORS : 1;
          const int64_t channel = WHOLE ? std::min(v, p.channels - W) : 0;
          s.in = in + channel;
          s.taps.weight = p.taps.weight + channel;
          s.bias = p.bias ? p.bias + channel : nullptr;
          s.out = out + channel;
          s.total = p.totals ? p.totals + v : nullptr;
          (vectors == VECTORS ? convolve_all : convolve_run)(s);
        }
      }
    }
  }
}

static bool is_direct(const Problem& p) {
  const auto both = [](const int64_t (&n)[2], int64_t value) {
    return n[0] == value && n[1] == value;
  };
  if (p.multiplier != 1) return false;
  const int64_t side = p.kernel[0];
  if (!both(p.kernel, side) || !both(p.padding, side / 2) || !both(p.dilation, 1)) return false;
  if (p.stride[1] > 2) return false;
  if (side == 3) return true;
  const int64_t bytes = p.bfloat16 ? sizeof(BFloat16) : sizeof(float);
  const int64_t band_rows = (BAND_ROWS - 1) * p.stride[0] + side;
  return (side == 5 || side == 7) && p.channels >= W &&
         p.in_stride[2] * bytes % CONFLICT_BYTES != 0 &&
         std::min(band_rows, p.size[0]) * p.in_stride[1] * bytes <= BAND_BYTES;
}

// Output rows `rows` of one image.
template <class T>
static void convolve_rows(const Problem& p, const Tensors& t, const Taps& taps, int64_t image,
                          Range rows) {
  const Part<T> part{static_cast<const T*>(t.in) + image * p.in_stride[0],
                     {0, p.size[0]},
                     {0, p.size[1]},
                     p.in_stride[1],
                     p.in_stride[2],
                     taps,
                     t.bias,
                     static_cast<T*>(t.out) + image * p.out_stride[0] + rows.begin * p.out_stride[1],
                     p.out_stride[1],
                     p.out_stride[2],
                     p.channels,
                     p.kernel[0],
                     {p.stride[0], p.stride[1]},
                     p.activation,
                     p.kernel[0] == 3 ? p.channels : LINE_VALUES<T>,
                     nullptr};
  const Range columns{0, p.out_size[1]};
  p.channels >= W ? convolve_part<true>(part, rows, columns)
                  : convolve_part<false>(part, rows, columns);
}

// Any window, with the faster of the two methods.
template <class T>
static void forward_any(const Problem& p, const Tensors& t) {
  if (!is_direct(p)) return forward<T>(p, t);
  static thread_local ScratchBuffer<float> buffer;
  const Taps taps = taps_of<T>(t.weight, p.channels, p.channels, p.kernel[0], buffer);
  const int64_t rows = p.kernel[0] == 3 ? 1 : BAND_ROWS;
  const int64_t bands = (p.out_size[0] + rows - 1) / rows;
  parallel::for_each(p.batch * bands, p.threads, [&](int64_t index) {
    convolve_rows<T>(p, t, taps, index / bands, share(p.out_size[0], index % bands, bands));
  });
}

}  // namespace depthwise
