// The first layers of a network: a chain of convolutions, computed for some rows of an image at a
// time, so that intermediate maps stay in the caches. The first layer has any window and reads the
// image's planes directly. The others are 3×3 with stride 2 and padding 1, on channels-last maps.
// The inputs of a window are contiguous segments, the same for all pixels of an output row apart
// from an offset: for the linear kernel, pixels are rows and segments are parts of a row. BFloat16
// is multiplied in pairs: of adjacent pixels in a plane, then of channels.
#include "common/kernel.h"
#include "gemm/registers.h"

namespace stem {

using linear::Block;
using linear::MAX_ROWS;
using linear::PANEL;
using linear::Range;
using simd::F;
using simd::W;

// packed_stem.py fills in these fields.
struct Problem {
  int64_t batch, channels, height, width;  // of the images
  int64_t side, stride, padding;           // of the first layer's window; the stride is 2 or 4
  int64_t layers, bfloat16, threads;
};

// `weight` is [channels][inputs of a window], packed by pack.h, in the order in which the layer
// reads inputs: channel, row, column in the first layer; row, column, channel in the others. Floats
// or, for maps of BFloat16, pairs; rows of the first layer's window are padded with zeros to whole
// pairs.
struct Layer {
  const void* weight;
  const float* bias;
  int64_t channels, activation;
};

constexpr int SIDE = 3, STRIDE = 2;
// The number of units I, floats or pairs, that hold `numbers` numbers of a plane.
template <class I>
static constexpr int64_t units(int64_t numbers) {
  return std::is_same_v<I, float> ? numbers : (numbers + 1) / 2;
}
// Bytes of intermediate maps per step, unless one row of the result needs more.
constexpr int64_t BETWEEN_BYTES = 4 << 20;

static int64_t halved(int64_t size) { return (size + 1) / 2; }
// The output size of the first layer along one side of the image.
static int64_t first_size(const Problem& p, int64_t size) {
  return (size + 2 * p.padding - p.side) / p.stride + 1;
}

// A channels-last map or a plane, stored from row `first` on, with the address of that row's first
// pixel. Rows outside the map are `zeros`.
template <class T>
struct Map {
  T* origin;
  int64_t height, width, pitch;
  const T* zeros;
  int64_t first = 0;

  T* place(int64_t y) const { return origin + (y - first) * pitch; }
  const T* row(int64_t y) const { return y < 0 || y >= height ? zeros : place(y); }
};

// The window inputs of one output row, from the left end of pixel 0's window.
template <class T>
struct Segments {
  std::vector<const T*> rows;
  int64_t length;  // of each
};

// Some pixels and one panel. I is the type of a layer's inputs and weights, T that of maps.
template <class I, class T, int R, int V>
static void run_nhwc(const linear::Problem& p, const Segments<I>& segments, ptrdiff_t place,
                    const I* weight, const Block<T>& block) {
  F sum[R][V];
  linear::start(block, sum);
  const auto nothing = []() VB_INLINE_LAMBDA {};
  for (const I* row : segments.rows) {
    weight = linear::add_products<linear::STEP>(row + place, p.in_stride, segments.length, weight,
                                                nothing, sum);
  }
  linear::finish<T, R, V>(p, block, sum);
}

// The same for windows in a plane, `APART` from each other, with constant offsets.
template <class I, class T, int APART, int R, int V>
static void run_nchw(const linear::Problem& p, const Segments<I>& segments, ptrdiff_t place,
                       const I* weight, const Block<T>& block) {
  F sum[R][V];
  linear::start(block, sum);
  for (const I* row : segments.rows) {
    const I* in = row + place;
    for (const I* const end = in + segments.length; in < end; in++, weight += V * W) {
      // Keeps the compiler from reusing inputs that pixels share: there are no registers left.
      __asm__("" : "+r"(in));
      F w[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) {
        w[v] = simd::in_register(linear::load_weights(weight + v * W, 0));
      }
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        const F x = simd::in_register(linear::load_input(in + r * APART));
        VB_UNROLL
        for (int v = 0; v < V; v++) linear::add_product(in, sum[r][v], x, w[v]);
      }
    }
  }
  linear::finish<T, R, V>(p, block, sum);
}

template <class I, class T>
using Run = void (*)(const linear::Problem&, const Segments<I>&, ptrdiff_t, const I*,
                     const Block<T>&);

// APART is the distance of windows in a plane, or 0 in a map.
template <int APART, class I, class T>
static Run<I, T> run_of(int64_t pixels, bool wide) {
  static constexpr auto runs = variants<2>([](auto v) {
    return variants<MAX_ROWS>([](auto r) -> Run<I, T> {
      if constexpr (APART == 0) {
        return run_nhwc<I, T, r.value, decltype(v)::value>;
      } else {
        return run_nchw<I, T, APART, r.value, decltype(v)::value>;
      }
    });
  });
  return runs[wide][pixels - 1];
}

// An output row; APART is nonzero in the first layer.
template <int APART, class I, class T>
static void run_pixels(const linear::Problem& p, const Layer& layer, const Segments<I>& segments,
                       int64_t pixels, T* out) {
  const int64_t blocks = (pixels + MAX_ROWS - 1) / MAX_ROWS;
  const I* const weight = static_cast<const I*>(layer.weight);
  for (int64_t i = 0; i < blocks; i++) {
    const Range range = linear::share(pixels, i, blocks);
    const int64_t count = range.end - range.begin;
    for (int64_t n = 0; n < layer.channels; n += PANEL) {
      const int64_t left = layer.channels - n;
      const bool wide = left > W;
      const Block<T> block{nullptr, nullptr, layer.bias + n, nullptr,
                           out + range.begin * p.out_stride + n, nullptr,
                           static_cast<int>(std::min<int64_t>(W, wide ? left - W : left)),
                           nullptr};
      linear::fetch_outputs(p, block, 0, count, wide ? PANEL : W);
      run_of<APART, I, T>(count, wide)(p, segments, range.begin * p.in_stride,
                                       weight + n * p.in_features, block);
    }
  }
}

// `inputs` of a window and `in_stride` are in units of the input type.
static linear::Problem problem_of(const Layer& layer, int64_t inputs, int64_t in_stride) {
  linear::Problem p{};
  p.in_features = inputs;
  p.in_stride = in_stride;
  p.out_features = p.out_stride = layer.channels;
  p.activation = layer.activation;
  return p;
}

// An output row of the first layer. Its input rows are copied, with zeros for the padding of the
// first and last windows.
template <class I, class T>
static void first_row(const Problem& problem, const Layer& layer,
                      const std::vector<Map<const T>>& planes, int64_t y, T* out) {
  static thread_local ScratchBuffer<I> buffer;
  const int64_t count = static_cast<int64_t>(planes.size()) * problem.side, width = planes[0].width;
  const int64_t pixels = first_size(problem, width), columns = units<I>(problem.side);
  const int64_t seen = (pixels - 1) * units<I>(problem.stride) + columns;
  const int64_t numbers = sizeof(I) / sizeof(T), copied = problem.padding + width;
  const int64_t pitch = std::max(seen, units<I>(copied));
  Segments<I> segments{{}, columns};
  segments.rows.reserve(static_cast<size_t>(count));
  I* copy = buffer.of(count * pitch);
  for (const Map<const T>& plane : planes) {
    for (int64_t k = 0; k < problem.side; k++, copy += pitch) {
      T* const row = reinterpret_cast<T*>(copy);
      std::fill_n(row, problem.padding, T{});
      std::copy_n(plane.row(problem.stride * y - problem.padding + k), width, row + problem.padding);
      std::fill(row + copied, row + pitch * numbers, T{});
      segments.rows.push_back(copy);
    }
  }
  const linear::Problem p = problem_of(layer, count * columns, units<I>(problem.stride));
  if (problem.stride == STRIDE) {
    run_pixels<units<I>(STRIDE)>(p, layer, segments, pixels, out);
  } else {
    run_pixels<units<I>(2 * STRIDE)>(p, layer, segments, pixels, out);
  }
}

// An output row of another layer; its input has a column of zeros on both sides.
template <class I, class T>
static void next_row(const Layer& layer, const Map<T>& in, int64_t channels, int64_t y, T* out) {
  const int64_t shares = channels * int64_t{sizeof(T)} / int64_t{sizeof(I)};
  Segments<I> segments{{}, SIDE * shares};
  for (int64_t k = 0; k < SIDE; k++) {
    segments.rows.push_back(reinterpret_cast<const I*>(in.row(STRIDE * y - 1 + k) - channels));
  }
  const linear::Problem p = problem_of(layer, SIDE * SIDE * shares, STRIDE * shares);
  run_pixels<0>(p, layer, segments, halved(in.width), out);
}

// The number of rows of the last map computed at a time.
template <class T>
static int64_t rows_at_a_time(const std::vector<Map<T>>& maps, int64_t threads) {
  int64_t values = 0;  // of the other maps, per row
  for (size_t i = 0; i + 1 < maps.size(); i++) values = STRIDE * (values + maps[i].pitch);
  const int64_t rows = BETWEEN_BYTES / std::max<int64_t>(1, values * int64_t{sizeof(T)});
  const int64_t height = maps.back().height;
  return std::clamp(rows / threads * threads, std::min(threads, height), height);
}

template <class I, class T>
static void forward_of(const Problem& p, const Layer* layers, const T* in, T* out) {
  static thread_local std::vector<std::vector<T>> buffers;
  const size_t last = static_cast<size_t>(p.layers) - 1;
  buffers.resize(last + 1);
  std::vector<Map<T>> maps;  // the output of each layer
  int64_t height = p.height, width = p.width, widest = width;
  for (size_t i = 0; i <= last; i++) {
    height = i ? halved(height) : first_size(p, height);
    width = i ? halved(width) : first_size(p, width);
    const int64_t channels = layers[i].channels, sides = i < last ? 2 * channels : 0;
    maps.push_back({out, height, width, width * channels + sides, nullptr});
    widest = std::max(widest, maps[i].pitch);
  }
  const int64_t at_once = rows_at_a_time(maps, p.threads);
  std::vector<T>& zeros = buffers[last];
  zeros.assign(static_cast<size_t>(widest), T{});
  for (size_t i = 0; i < last; i++) {
    Map<T>& map = maps[i];
    // The last of the previous rows, and the new ones.
    const int64_t rows = 1 + std::min(map.height, at_once << (last - i));
    const int64_t channels = layers[i].channels;
    buffers[i].resize(static_cast<size_t>(rows * map.pitch));
    map.origin = buffers[i].data() + channels;
    map.zeros = zeros.data() + channels;
    for (int64_t y = 0; y < rows; y++) {
      std::fill_n(map.origin + y * map.pitch - channels, channels, T{});
      std::fill_n(map.origin + (y + 1) * map.pitch - 2 * channels, channels, T{});
    }
  }
  std::vector<int64_t> done(last + 1), end(last + 1);  // rows of each map
  for (int64_t image = 0; image < p.batch; image++) {
    std::vector<Map<const T>> planes;
    for (int64_t c = 0; c < p.channels; c++, in += p.height * p.width) {
      planes.push_back({in, p.height, p.width, p.width, zeros.data()});
    }
    std::fill(done.begin(), done.end(), 0);
    while (done[last] < maps[last].height) {
      end[last] = std::min(done[last] + at_once, maps[last].height);
      for (size_t i = last; i-- > 0;) end[i] = std::min(STRIDE * end[i + 1], maps[i].height);
      for (size_t i = 0; i <= last; i++) {
        Map<T>& map = maps[i];
        const int64_t begin = done[i], inside = map.width * layers[i].channels;
        if (i < last) {
          if (begin) std::copy_n(map.place(begin - 1), inside, map.origin);
          map.first = begin - 1;
        }
        parallel::for_each(end[i] - begin, p.threads, [&](int64_t k) {
          const int64_t y = begin + k;
          T* row = map.place(y);
          if (i) {
            next_row<I>(layers[i], maps[i - 1], layers[i - 1].channels, y, row);
          } else {
            first_row<I>(p, layers[i], planes, y, row);
          }
        });
        done[i] = end[i];
      }
    }
    maps[last].origin += maps[last].height * maps[last].pitch;
  }
}

static void forward(const Problem& p, const Layer* layers, const void* in, void* out) {
#if VB_BFLOAT16
  if (p.bfloat16) {
    return forward_of<linear::Pair>(p, layers, static_cast<const BFloat16*>(in),
                                    static_cast<BFloat16*>(out));
  }
#endif
  forward_of<float>(p, layers, static_cast<const float*>(in), static_cast<float*>(out));
}

}  // namespace stem

// The C interface, called from packed_stem.py.
// BFloat16 only if linear layers have products of it, see gemm.cpp.
extern "C" int stem_forward(const stem::Problem* problem, const stem::Layer* chain,
                            const void* in, void* out) {
  return status_of([&] { stem::forward(*problem, chain, in, out); });
}
