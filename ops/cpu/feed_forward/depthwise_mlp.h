// A feed-forward with an optional depthwise 3×3 convolution between its two linear layers, fused
// with the norm before and the shortcut after. The hidden map is many times larger than input and
// output. It is computed in strips of rows, split into blocks of columns if wide. If the whole map
// is a single strip, it is computed in chunks of channels. So it never leaves the L2 cache.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include "common/activation.h"
#include "depthwise/square.h"
#include "common/lanes.h"
#include "gemm/call.h"
#include "norm/norm.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace depthwise_mlp {

using linear::Range;
using simd::F;
using simd::W;

// depthwise_mlp.py parses these fields.
struct Problem {
  int64_t batch, height, width, in_features, hidden, out_features;
  int64_t chunk;                          // hidden channels per step, whole panels
  int64_t span;                           // inputs of the second layer per step, whole chunks
  int64_t activation, conv_activation;    // after the first layer, after the convolution
  double eps;                             // of the norm
  int64_t bfloat16, threads;
};

// Maps are [batch][height][width][features]. Null if unused: `norm_weight` and `norm_bias`
// [in_features], `taps` [9][hidden] with `conv_bias` [hidden], and `other`, which is added to the
// result. In `weight2`, each span of inputs is packed separately. Void pointers are to float or
// BFloat16.
struct Tensors {
  const void *in, *norm_weight, *norm_bias, *weight1;
  const float *bias1, *taps, *conv_bias;
  const void* weight2;
  const float* bias2;
  const void* other;
  void* out;
};

// Values of the hidden map per step. The L2 cache of a core holds the map before and after the
// convolution, inputs, outputs and weights. In bfloat16 the map after the convolution is as large.
template <class T>
constexpr int64_t STRIP = 96 * 1024;
template <>
constexpr int64_t STRIP<BFloat16> = 48 * 1024;

// Wanted rows of a strip, including those shared with neighbours, and least columns of a block.
// Shared rows and columns are computed or copied twice.
constexpr int64_t STRIP_ROWS = 8, BLOCK_COLUMNS = 64;

template <class T>
struct Scratch {
  ScratchBuffer<T> normed, hidden, mixed;
};

// ---- strips ------------------------------------------------------------------------------------
static int64_t length(Range range) { return range.end - range.begin; }

// The rows of a block of columns of one image, for one thread.
template <class T>
struct Task {
  const Problem& p;
  const Tensors& t;
  int64_t image;
  Range rows, columns;
  Scratch<T>& s;

  int64_t margin() const { return t.taps ? 1 : 0; }
  // The pixel stride of a map with `channels` channels: an odd number of cache lines, so that
  // pixels do not map to the same sets of the L1 cache.
  int64_t pitch(int64_t channels) const {
    constexpr int64_t line = linear::LINE / int64_t{sizeof(T)};
    return ((std::min(channels, p.hidden) + line - 1) / line | 1) * line;
  }

  int64_t chunks() const { return (p.hidden + p.chunk - 1) / p.chunk; }
  Range seen_columns() const {
    return {std::max<int64_t>(0, columns.begin - margin()),
            std::min(p.width, columns.end + margin())};
  }
  int64_t width() const { return length(seen_columns()); }

  // The number of blocks of columns.
  int64_t blocks() const {
    const int64_t fitting =
        std::max<int64_t>(1, 2 * STRIP<T> / (STRIP_ROWS * pitch(p.chunk) * chunks()));
    const int64_t wanted = t.taps ? (p.width + fitting - 1) / fitting : 1;
    return std::max<int64_t>(1, std::min(wanted, p.width / BLOCK_COLUMNS));
  }

  void run() const {
    const int64_t count = length(rows), row = width() * pitch(p.chunk), chunks = this->chunks();
    const bool whole = (count + 2 * margin()) * row <= STRIP<T>;
    const int64_t fitting =
        std::max<int64_t>(1, 2 * STRIP<T> / (row * chunks) - 2 * margin());
    const int64_t strips = whole ? 1 : (count + fitting - 1) / fitting;
    // All chunks of a strip are kept for the next strip, which starts with their last rows.
    const int64_t height = (count + strips - 1) / strips + 2 * margin();
    T* hidden = s.hidden.of(height * row * (strips > 1 ? chunks : 1));
    Range had{0, 0};
    for (int64_t i = 0; i < strips; i++) {
      const Range strip{rows.begin + count * i / strips, rows.begin + count * (i + 1) / strips};
      const Range seen{std::max<int64_t>(0, strip.begin - margin()),
                       std::min(p.height, strip.end + margin())};
      const Range fresh{std::max(seen.begin, had.end), seen.end};
      const T* in = input(fresh);
      T* mixed = t.taps ? s.mixed.of(length(strip) * length(columns) * pitch(p.span)) : nullptr;
      for (int64_t c = 0; c < chunks; c++) {
        T* map = hidden + (strips > 1 ? c * height * row : 0);
        const int64_t kept = fresh.begin - seen.begin;
        if (kept) std::memmove(map, map + (seen.begin - had.begin) * row, kept * row * sizeof(T));
        expand(c, in, length(fresh), map + kept * row);
        const int64_t begin = c * p.chunk / p.span * p.span, end = c * p.chunk + channels(c);
        if (t.taps) mix(c, map, seen, strip, mixed + c * p.chunk - begin);
        if (end % p.span == 0 || end == p.hidden) {
          project({begin, end}, t.taps ? mixed : map, strip);
        }
      }
      had = seen;
    }
  }

  int64_t place(int64_t y, int64_t x) const { return (image * p.height + y) * p.width + x; }
  // Whether rows of `width` pixels are contiguous in input and output.
  bool in_a_row(int64_t width) const { return width == p.width; }

  // Input rows of the block; contiguous if there is a norm.
  const T* input(Range range) const {
    const T* in = static_cast<const T*>(t.in) +
                  place(range.begin, seen_columns().begin) * p.in_features;
    if (!t.norm_weight) return in;
    const int64_t count = in_a_row(width()) ? 1 : length(range);
    const int64_t pixels = length(range) * width() / count;
    T* out = s.normed.of(count * pixels * p.in_features);
    const norm::Norm<T> norm{p.in_features, static_cast<const T*>(t.norm_weight),
                             static_cast<const T*>(t.norm_bias), static_cast<float>(p.eps)};
    for (int64_t i = 0; i < count; i++) {
      norm::normalise(norm, in + i * p.width * p.in_features, pixels,
                      out + i * pixels * p.in_features);
    }
    return out;
  }

  int64_t channels(int64_t c) const { return std::min(p.chunk, p.hidden - c * p.chunk); }

  void expand(int64_t c, const T* in, int64_t height, T* map) const {
    const bool whole = t.norm_weight || in_a_row(width());
    const int64_t calls = whole ? 1 : height, pixels = height * width() / calls;
    linear::Problem problem = linear::layer_of<T>(pixels, p.in_features, channels(c));
    problem.out_stride = pitch(p.chunk);
    problem.activation = p.activation;
    linear::Tensors tensors{};
    tensors.weight =
        static_cast<const T*>(t.weight1) + c * p.chunk * linear::padded_inputs(in, p.in_features);
    tensors.bias = t.bias1 + c * p.chunk;
    for (int64_t i = 0; i < calls; i++) {
      tensors.in = in + i * p.width * p.in_features;
      tensors.out = map + i * pixels * problem.out_stride;
      linear::forward(problem, tensors);
    }
  }

  // Convolves into a map of a span of channels, one vector of channels at a time, so that its rows
  // stay in the L1 cache.
  void mix(int64_t c, const T* map, Range seen, Range strip, T* out) const {
    const int64_t step = pitch(p.chunk), out_step = pitch(p.span), own = length(columns);
    const int64_t runs = (own + depthwise::RUN_PIXELS - 1) / depthwise::RUN_PIXELS;
    const Range seen_columns = this->seen_columns();
    for (int64_t v = 0; v < channels(c); v += W) {
      const int64_t channel = c * p.chunk + v;
      const int lanes = static_cast<int>(std::min<int64_t>(W, channels(c) - v));
      depthwise::Square<T> s{{},      step,  false, false, t.taps + channel, p.hidden,
                             t.conv_bias + channel, nullptr, out_step, lanes, p.conv_activation};
      for (int64_t y = strip.begin; y < strip.end; y++) {
        for (int64_t i = 0; i < runs; i++) {
          const Range run = linear::share(own, i, runs);
          const int64_t first = columns.begin + run.begin - seen_columns.begin;
          s.has_first = columns.begin + run.begin > 0;
          s.has_last = columns.begin + run.end < p.width;
          for (int r = 0; r < 3; r++) {
            const int64_t above = y - 1 + r;
            const bool inside = above >= seen.begin && above < seen.end;
            const int64_t pixel = (above - seen.begin) * length(seen_columns) + first - 1;
            s.rows[r] = inside ? map + pixel * step + v : nullptr;
          }
          s.out = out + ((y - strip.begin) * own + run.begin) * out_step + v;
          constexpr std::make_index_sequence<depthwise::RUN_PIXELS> variants;
          depthwise::square_of<T, 1>(run.end - run.begin, lanes == W, variants)(s);
        }
      }
    }
  }

  // Adds the products of some inputs of the second layer.
  void project(Range inputs, const T* mixed, Range strip) const {
    const int64_t calls = in_a_row(length(columns)) ? 1 : length(strip);
    const int64_t pixels = length(strip) * length(columns) / calls;
    linear::Problem problem = linear::layer_of<T>(pixels, length(inputs), p.out_features);
    problem.in_stride = pitch(p.span);
    problem.other_stride = p.out_features;
    const void* other = inputs.begin ? t.out : t.other;
    problem.combination = other ? linear::ADD : linear::NONE;
    linear::Tensors tensors{};
    tensors.weight =
        static_cast<const T*>(t.weight2) + inputs.begin * linear::padded(p.out_features);
    // The first inputs initialize the sums, the others accumulate.
    tensors.bias = t.bias2 + (inputs.begin ? p.out_features : 0);
    for (int64_t i = 0; i < calls; i++) {
      const int64_t from = place(strip.begin + i, columns.begin) * p.out_features;
      tensors.in = mixed + i * pixels * problem.in_stride;
      tensors.out = static_cast<T*>(t.out) + from;
      tensors.other = other ? static_cast<const T*>(other) + from : nullptr;
      linear::forward(problem, tensors);
    }
  }
};

template <class T>
static void forward_of(const Problem& p, const Tensors& t) {
  const int64_t shares =
      std::max<int64_t>(1, std::min(p.height, (p.threads + p.batch - 1) / p.batch));
  const int64_t tasks = p.batch * shares;
  const auto work = [&](int64_t index) {
    static thread_local Scratch<T> s;
    const int64_t image = index / shares, share = index % shares;
    Task<T> task{p, t, image, {p.height * share / shares, p.height * (share + 1) / shares},
                 {0, p.width}, s};
    const int64_t blocks = task.blocks();
    for (int64_t i = 0; i < blocks; i++) {
      task.columns = linear::share(p.width, i, blocks);
      task.run();
    }
  };
  parallel::for_each(tasks, p.threads, work);
}

static void forward(const Problem& p, const Tensors& t) {
  p.bfloat16 ? forward_of<BFloat16>(p, t) : forward_of<float>(p, t);
}

}  // namespace depthwise_mlp
