// A feed-forward with an optional depthwise convolution between its two linear layers, fused with
// the norm before and the shortcut after; also an inverted bottleneck, with windows of 3×3 to 7×7
// and strides of 1 or 2. The hidden map is many times larger than input and output. It is computed
// in strips of rows, split into blocks of columns if wide. If the whole map is a single strip, it is
// computed in chunks of channels. So it never leaves the L2 cache. Without the second linear layer,
// the result is the map after the convolution, and the means of its channels.
#include <cstring>
#include "common/kernel.h"
#include "common/activation.h"
#include "depthwise/direct.h"
#include "gemm/call.h"
#include "norm/norm.h"

namespace depthwise_mlp {

using linear::Range;

// depthwise_mlp.py fills in these fields.
struct Problem {
  int64_t batch, height, width, in_features, hidden, out_features;
  int64_t kernel, stride;                 // of the convolution, padded with kernel / 2 zeros
  int64_t taps_stride;                    // between the taps of a channel
  int64_t chunk;                          // hidden channels per step, whole panels
  int64_t span;                           // inputs of the second layer per step, whole chunks
  int64_t activation, conv_activation;    // after the first layer, after the convolution
  double eps;                             // of the norm
  int64_t bfloat16, threads;
};

// Maps are [batch][height][width][features]. Null if unused: `norm_weight` and `norm_bias`
// [in_features], `weight1` and `bias1` (then the input is the hidden map, of which each span has W
// channels or more), `taps` [kernel²][taps_stride] with `conv_bias`, both for whole vectors of
// channels, and `other`, which is added to the result. In `weight2`, each span of inputs is packed
// separately. If that is null, the result is the map after the convolution, whose chunks have W
// channels or more, and `means` [batch][hidden] are those of its channels. Void pointers are to float
// or BFloat16.
struct Tensors {
  const void *in, *norm_weight, *norm_bias, *weight1;
  const float *bias1, *taps, *conv_bias;
  const void* weight2;
  const float* bias2;
  const void* other;
  void* out;
  void* means;
};

// Values of the hidden map per step. The L2 cache of a core holds the map before and after the
// convolution, inputs, outputs and weights. In bfloat16 the map after the convolution is as large.
// Tiles multiply so fast that reading the weights again for every strip takes as long: such CPUs
// have L2 caches of 2 MiB for larger strips.
template <class T>
constexpr int64_t STRIP = 96 * 1024;
template <>
#if VB_AMX
constexpr int64_t STRIP<BFloat16> = 192 * 1024;
#else
constexpr int64_t STRIP<BFloat16> = 48 * 1024;
#endif

// Wanted rows of a strip, including those shared with neighbours, and least columns of a block.
// Shared rows and columns are computed or copied twice.
constexpr int64_t STRIP_ROWS = 8, BLOCK_COLUMNS = 64;

template <class T>
struct Scratch {
  ScratchBuffer<T> normed, hidden, mixed;
};

// ---- strips ------------------------------------------------------------------------------------
// Output rows of a block of columns of one image, for one thread.
template <class T>
struct Task {
  const Problem& p;
  const Tensors& t;
  const depthwise::Taps& taps;
  int64_t image;
  Range rows, columns;
  Scratch<T>& s;
  float* totals;  // of the channels of the result, see depthwise::Part; or null

  int64_t margin() const { return p.kernel / 2; }
  int64_t out_width() const { return (p.width - 1) / p.stride + 1; }
  int64_t out_height() const { return (p.height - 1) / p.stride + 1; }
  // The pixel stride of a map with `channels` channels: an odd number of cache lines, so that
  // pixels do not map to the same sets of the L1 cache.
  int64_t pitch(int64_t channels) const {
    constexpr int64_t line = linear::LINE / int64_t{sizeof(T)};
    return ((std::min(channels, p.hidden) + line - 1) / line | 1) * line;
  }

  int64_t chunks() const { return (p.hidden + p.chunk - 1) / p.chunk; }
  // The inputs of some output rows or columns of a map with `size` of them.
  Range seen(Range range, int64_t size) const {
    return {std::max<int64_t>(0, range.begin * p.stride - margin()),
            std::min(size, (range.end - 1) * p.stride + margin() + 1)};
  }
  int64_t width() const { return length(seen(columns, p.width)); }

  // The number of blocks of columns.
  int64_t blocks() const {
    const int64_t fitting =
        std::max<int64_t>(1, 2 * STRIP<T> / (STRIP_ROWS * pitch(p.chunk) * chunks()));
    const int64_t wanted = t.taps ? (p.width + fitting - 1) / fitting : 1;
    return std::max<int64_t>(1, std::min(wanted, p.width / BLOCK_COLUMNS));
  }

  void run() const {
    const int64_t count = length(rows), row = width() * pitch(p.chunk), chunks = this->chunks();
    const int64_t shared = p.kernel - p.stride;  // rows that a strip shares with the one before
    const bool whole = (count * p.stride + shared) * row <= STRIP<T>;
    // Without a first layer, nothing is kept.
    const int64_t values = t.weight1 ? 2 * STRIP<T> : STRIP<T> / 2;
    const int64_t fitting = std::max<int64_t>(1, (values / (row * chunks) - shared) / p.stride);
    const int64_t strips = whole ? 1 : (count + fitting - 1) / fitting;
    // All chunks of a strip are kept for the next strip, which starts with their last rows.
    const int64_t height = (count + strips - 1) / strips * p.stride + shared;
    T* hidden = t.weight1 ? s.hidden.of(height * row * (strips > 1 ? chunks : 1)) : nullptr;
    Range had{0, 0};
    for (int64_t i = 0; i < strips; i++) {
      const Range share = linear::share(count, i, strips);
      const Range strip{rows.begin + share.begin, rows.begin + share.end};
      const Range seen = this->seen(strip, p.height);
      const Range fresh{std::max(seen.begin, had.end), seen.end};
      const bool expands = t.weight1 && length(fresh) > 0;  // one before may have seen all rows
      const T* in = expands ? input(fresh) : nullptr;
      T* mixed = t.taps && t.weight2
                     ? s.mixed.of(length(strip) * length(columns) * pitch(p.span))
                     : nullptr;
      for (int64_t c = 0; c < chunks; c++) {
        T* map = nullptr;
        if (t.weight1) {
          map = hidden + (strips > 1 ? c * height * row : 0);
          const int64_t kept = fresh.begin - seen.begin;
          if (kept) std::memmove(map, map + (seen.begin - had.begin) * row, kept * row * sizeof(T));
          if (expands) expand(c, in, length(fresh), map + kept * row);
        }
        if (!t.weight2) {
          mix(c, map, seen, strip, nullptr);
          continue;
        }
        const int64_t begin = c * p.chunk / p.span * p.span, end = c * p.chunk + channels(c);
        if (t.taps) mix(c, map, seen, strip, mixed + c * p.chunk - begin);
        if (end % p.span == 0 || end == p.hidden) {
          project({begin, end}, t.taps ? mixed : map, strip);
        }
      }
      had = seen;
    }
  }

  // The input at a pixel.
  const T* in_at(int64_t y, int64_t x) const {
    return static_cast<const T*>(t.in) + ((image * p.height + y) * p.width + x) * p.in_features;
  }
  // Whether input rows of the block are contiguous.
  bool in_a_row() const { return width() == p.width; }

  // Input rows of the block; contiguous if there is a norm.
  const T* input(Range range) const {
    const T* in = in_at(range.begin, seen(columns, p.width).begin);
    if (!t.norm_weight) return in;
    const int64_t count = in_a_row() ? 1 : length(range);
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
    const bool whole = t.norm_weight || in_a_row();
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

  // Convolves into a map of a span of channels, or into the result if `out` is null. The hidden map
  // and the taps are padded to whole vectors; of the input, which may be the hidden map, and the
  // result, the last vectors may overlap.
  void mix(int64_t c, const T* map, Range seen, Range strip, T* out) const {
    const Range seen_columns = this->seen(columns, p.width);
    const int64_t channel = c * p.chunk, step = map ? pitch(p.chunk) : p.in_features;
    depthwise::Part<T> part{map,
                            seen,
                            seen_columns,
                            (map ? width() : p.width) * step,
                            step,
                            {taps.weight + channel, taps.stride},
                            t.conv_bias + channel,
                            out,
                            length(columns) * pitch(p.span),
                            pitch(p.span),
                            map ? simd::round_up(channels(c), simd::W) : channels(c),
                            p.kernel,
                            {p.stride, p.stride},
                            p.conv_activation,
                            map ? depthwise::LINE_VALUES<T> : channels(c),
                            totals ? totals + channel : nullptr};
    if (!map) part.in = in_at(seen.begin, seen_columns.begin) + channel;
    if (!out) {
      const int64_t row = image * out_height() + strip.begin;
      part.out = static_cast<T*>(t.out) + (row * out_width() + columns.begin) * p.hidden + channel;
      part.out_row = out_width() * p.hidden;
      part.out_pixel = p.hidden;
      part.channels = channels(c);
    }
    depthwise::convolve_part<true>(part, strip, columns);
  }

  // Adds the products of some inputs of the second layer.
  void project(Range inputs, const T* mixed, Range strip) const {
    const int64_t calls = length(columns) == out_width() ? 1 : length(strip);
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
      const int64_t row = image * out_height() + strip.begin + i;
      const int64_t from = (row * out_width() + columns.begin) * p.out_features;
      tensors.in = mixed + i * pixels * problem.in_stride;
      tensors.out = static_cast<T*>(t.out) + from;
      tensors.other = other ? static_cast<const T*>(other) + from : nullptr;
      linear::forward(problem, tensors);
    }
  }
};

// The mean of a channel, from the totals of the parts of an image. The last vector of an incomplete
// one ends with the last channel.
static float mean_of(const Problem& p, const float* totals, int64_t shares, int64_t pitch,
                     int64_t channel, int64_t pixels) {
  const int64_t rest = p.hidden % simd::W;
  const int64_t place = channel + (channel >= p.hidden - rest ? simd::W - rest : 0);
  float sum = 0.f;
  for (int64_t i = 0; i < shares; i++) sum += totals[i * pitch + place];
  return sum / static_cast<float>(pixels);
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t height = (p.height - 1) / p.stride + 1, width = (p.width - 1) / p.stride + 1;
  const int64_t shares =
      std::max<int64_t>(1, std::min(height, (p.threads + p.batch - 1) / p.batch));
  static thread_local ScratchBuffer<float> buffer;
  const int64_t pitch = simd::round_up(p.hidden, simd::W);
  float* const totals = t.means ? buffer.of(p.batch * shares * pitch) : nullptr;
  if (totals) std::fill_n(totals, p.batch * shares * pitch, 0.f);
  static thread_local ScratchBuffer<float> packed;
  const int64_t padded = t.weight1 ? pitch : p.hidden;
  const depthwise::Taps taps =
      t.taps ? depthwise::taps_of<T>(t.taps, p.taps_stride, padded, p.kernel, packed)
             : depthwise::Taps{};
  const auto work = [&](int64_t index) {
    static thread_local Scratch<T> s;
    Task<T> task{p, t, taps, index / shares, linear::share(height, index % shares, shares),
                 {0, width}, s, totals ? totals + index * pitch : nullptr};
    const int64_t blocks = task.blocks();
    for (int64_t i = 0; i < blocks; i++) {
      task.columns = linear::share(width, i, blocks);
      task.run();
    }
  };
  parallel::for_each(p.batch * shares, p.threads, work);
  for (int64_t image = 0; t.means && image < p.batch; image++) {
    for (int64_t c = 0; c < p.hidden; c++) {
      const float mean =
          mean_of(p, totals + image * shares * pitch, shares, pitch, c, height * width);
      simd::assign(static_cast<T*>(t.means) + image * p.hidden + c, mean);
    }
  }
}

}  // namespace depthwise_mlp

// The C interface, called from depthwise_mlp.py.
extern "C" int depthwise_mlp_forward(const depthwise_mlp::Problem* problem,
                                     const depthwise_mlp::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    depthwise_mlp::forward<decltype(type)>(*problem, *tensors);
  });
}
