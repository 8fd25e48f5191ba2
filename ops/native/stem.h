// The first layers of a network, 3×3 convolutions of stride 2 and padding 1 one after the other, an
// image at a time, so that the maps between them stay in the second-level cache. The first reads
// the planes of the image as they lie; the maps have channels last. The inputs of a window are
// segments of neighbours, the same for all pixels of an output row but for the place where they
// begin: to the kernel of linear layers, pixels are rows and segments parts of a row.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>
#include "linear_registers.h"
#include "norm.h"
#include "parallel.h"

namespace stem {

using linear::Block;
using linear::MAX_ROWS;
using linear::PANEL;
using linear::Range;
using simd::F;
using simd::W;

// ops/inference/stem.py has the same fields in the same order.
struct Problem {
  int64_t batch, channels, height, width;  // of the images
  int64_t layers, threads;
};

// `weight` as linear.h packs [channels][inputs of a window], which are ordered as the layer reads
// them: channel, row, column by the first layer, row, column, channel by the others.
struct Layer {
  const float *weight, *bias;
  const float *norm_weight, *norm_bias;  // of a layer norm before the activation, or null
  int64_t channels, activation;
  double eps;  // of the norm
};

constexpr int SIDE = 3, STRIDE = 2;
// Of the maps between the layers; larger ones are not kept for the next call.
constexpr int64_t KEPT_FLOATS = 4 << 20;

static int64_t halved(int64_t size) { return (size + 1) / 2; }

// A map with channels last, or a plane, and where pixel (0, 0) is. Rows outside are `zeros`.
struct Map {
  const float* origin;
  int64_t height, width, pitch;
  const float* zeros;

  const float* row(int64_t y) const { return y < 0 || y >= height ? zeros : origin + y * pitch; }
};

// Of one output row: what its windows see, from the column of pixel 0 on.
struct Segments {
  std::vector<const float*> rows;
  int64_t length;  // of each
  ptrdiff_t left;  // from the column of pixel 0 to the left end of its window
};

template <int R, int V>
static void run_map(const linear::Problem& p, const Segments& segments, ptrdiff_t place,
                    const Block<float>& block) {
  F sum[R][V];
  linear::start(block, sum);
  const float* weight = block.weight;
  const auto nothing = []() VB_INLINE_LAMBDA {};
  for (const float* row : segments.rows) {
    weight = linear::add_products<linear::STEP>(row + place, p.in_stride, segments.length, weight,
                                                nothing, sum);
  }
  linear::finish<float, R, V>(p, block, sum);
}

// The same for segments of three and pixels that lie `STRIDE` apart, whose places are constants.
template <int R, int V>
static void run_planes(const linear::Problem& p, const Segments& segments, ptrdiff_t place,
                       const Block<float>& block) {
  F sum[R][V];
  linear::start(block, sum);
  const float* weight = block.weight;
  for (const float* row : segments.rows) {
    const float* in = row + place;
    VB_UNROLL
    for (int k = 0; k < SIDE; k++, in++, weight += V * W) {
      // Lest the compiler keep what two pixels share, for which there are no registers.
      __asm__("" : "+r"(in));
      F w[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) w[v] = simd::in_register(simd::load(weight + v * W));
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        const F x = simd::in_register(simd::set1(in[r * STRIDE]));
        VB_UNROLL
        for (int v = 0; v < V; v++) linear::add_product(in, sum[r][v], x, w[v]);
      }
    }
  }
  linear::finish<float, R, V>(p, block, sum);
}

using Run = void (*)(const linear::Problem&, const Segments&, ptrdiff_t, const Block<float>&);

template <int V, size_t... I>
static Run run_of(int64_t pixels, bool planes, std::index_sequence<I...>) {
  static constexpr Run runs[][MAX_ROWS] = {{run_map<I + 1, V>...}, {run_planes<I + 1, V>...}};
  return runs[planes][pixels - 1];
}

static Run run_of(int64_t pixels, bool planes, bool wide) {
  constexpr std::make_index_sequence<MAX_ROWS> variants;
  return wide ? run_of<2>(pixels, planes, variants) : run_of<1>(pixels, planes, variants);
}

// Some pixels of an output row, `out` from the first of them on.
static void run_pixels(const linear::Problem& p, const Layer& layer, const Segments& segments,
                       Range pixels, float* out) {
  const int64_t count = pixels.end - pixels.begin, blocks = (count + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t i = 0; i < blocks; i++) {
    const Range range = linear::share(count, i, blocks);
    const ptrdiff_t place = (pixels.begin + range.begin) * p.in_stride + segments.left;
    for (int64_t n = 0; n < layer.channels; n += PANEL) {
      const int64_t left = layer.channels - n;
      const bool wide = left > W;
      const Block<float> block{nullptr, layer.weight + n * p.in_features, layer.bias + n, nullptr,
                               out + range.begin * p.out_stride + n, nullptr,
                               static_cast<int>(std::min<int64_t>(W, wide ? left - W : left))};
      const bool planes = segments.length == SIDE && p.in_stride == STRIDE;
      run_of(range.end - range.begin, planes, wide)(p, segments, place, block);
    }
  }
}

static linear::Problem problem_of(const Layer& layer, int64_t in_channels, int64_t in_stride) {
  linear::Problem p{};
  p.in_features = SIDE * SIDE * in_channels;
  p.in_stride = in_stride;
  p.out_features = p.out_stride = layer.channels;
  p.activation = layer.norm_weight ? activation::NONE : layer.activation;
  return p;
}

// An output row of the first layer. Windows that reach beyond a side of the image are copied.
static void first_row(const Layer& layer, const std::vector<Map>& planes, int64_t y, float* out) {
  const int64_t count = static_cast<int64_t>(planes.size()), width = planes[0].width;
  linear::Problem p = problem_of(layer, count, STRIDE);
  Segments segments{{}, SIDE, -1};
  for (const Map& plane : planes) {
    for (int64_t k = 0; k < SIDE; k++) segments.rows.push_back(plane.row(2 * y - 1 + k));
  }
  const int64_t pixels = halved(width), inside = width / 2;
  std::vector<float> window(static_cast<size_t>(p.in_features));
  for (int64_t x = 0; x < pixels; x = std::max(x + 1, inside)) {
    for (size_t i = 0; i < window.size(); i++) {
      const int64_t column = 2 * x - 1 + static_cast<int64_t>(i) % SIDE;
      window[i] = column < 0 || column >= width ? 0.f : segments.rows[i / SIDE][column];
    }
    const Segments copied{{window.data()}, p.in_features, 0};
    run_pixels(p, layer, copied, {0, 1}, out + x * p.out_stride);
  }
  run_pixels(p, layer, segments, {1, std::max<int64_t>(1, inside)}, out + p.out_stride);
}

// An output row of another layer; its input has a column of zeros at both sides.
static void next_row(const Layer& layer, const Map& in, int64_t channels, int64_t y, float* out) {
  Segments segments{{}, SIDE * channels, -channels};
  for (int64_t k = 0; k < SIDE; k++) segments.rows.push_back(in.row(2 * y - 1 + k));
  const linear::Problem p = problem_of(layer, channels, STRIDE * channels);
  run_pixels(p, layer, segments, {0, halved(in.width)}, out);
}

static void normalise(const Layer& layer, int64_t pixels, float* row) {
  const norm::Problem p{pixels, layer.channels, layer.activation, 0, layer.eps, 1};
  norm::forward(p, {row, layer.norm_weight, layer.norm_bias, row});
}

static void forward(const Problem& p, const Layer* layers, const float* in, float* out) {
  static thread_local std::vector<std::vector<float>> buffers;
  const int64_t last = p.layers - 1;
  buffers.resize(static_cast<size_t>(p.layers));
  std::vector<Map> maps;       // behind each layer
  std::vector<float*> origin;  // of each, to write to
  int64_t height = p.height, width = p.width, widest = width, floats = 0;
  for (int64_t i = 0; i < p.layers; i++) {
    height = halved(height), width = halved(width);
    const int64_t channels = layers[i].channels, inside = width * channels;
    const int64_t pitch = inside + (i < last ? 2 * channels : 0);
    float* begin = out;
    if (i < last) {
      buffers[i].resize(static_cast<size_t>(height * pitch));
      begin = buffers[i].data() + channels;
      for (int64_t y = 0; y < height; y++) {
        std::fill_n(begin + y * pitch - channels, channels, 0.f);
        std::fill_n(begin + y * pitch + inside, channels, 0.f);
      }
      widest = std::max(widest, pitch);
      floats += height * pitch;
    }
    origin.push_back(begin);
    maps.push_back({begin, height, width, pitch, nullptr});
  }
  std::vector<float>& zeros = buffers.back();
  zeros.assign(static_cast<size_t>(widest), 0.f);
  for (int64_t i = 0; i < last; i++) maps[i].zeros = zeros.data() + layers[i].channels;
  for (int64_t image = 0; image < p.batch; image++) {
    std::vector<Map> planes;
    for (int64_t c = 0; c < p.channels; c++, in += p.height * p.width) {
      planes.push_back({in, p.height, p.width, p.width, zeros.data()});
    }
    for (int64_t i = 0; i < p.layers; i++) {
      parallel::for_each(maps[i].height, p.threads, [&](int64_t y) {
        float* row = origin[i] + y * maps[i].pitch;
        if (i) {
          next_row(layers[i], maps[i - 1], layers[i - 1].channels, y, row);
        } else {
          first_row(layers[i], planes, y, row);
        }
        if (layers[i].norm_weight) normalise(layers[i], maps[i].width, row);
      });
    }
    origin[last] += maps[last].height * maps[last].pitch;
  }
  if (floats > KEPT_FLOATS) buffers.clear();
}

}  // namespace stem
