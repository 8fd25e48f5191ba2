// Depthwise convolution of channels-last maps. A vector holds `W` channels of one pixel. The input
// rows of a band of output rows are copied, `W` channels at a time, into a strip that stays in the
// cache and is padded with zeros on both sides. Two output rows that share input rows are computed
// together, for a run of pixels, with all sums in registers.
#pragma once
#include <numeric>
#include "common/kernel.h"
#include "common/activation.h"

namespace depthwise {

using simd::F;
using simd::W;

// conv.py fills in these fields. Axes are (rows, columns).
struct Problem {
  int64_t batch, channels;  // of the output
  int64_t multiplier;       // outputs of an input channel, next to each other
  int64_t size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t in_stride[3], out_stride[3];  // for image, row and pixel, in elements
  int64_t activation, bfloat16, threads;
};

// `weight` is [kernel rows * kernel columns][channels], `bias` [channels] or null.
struct Tensors {
  const void* in;
  const float* weight;
  const float* bias;
  void* out;
};

// Registers: two rows of sums, one tap's weight per row, and one for pixels.
constexpr int MAX_RUN = (simd::REGISTERS - 3) / 2;
// The size of a band's strip: half of the L1 cache of current cores; tall kernels need more.
constexpr int64_t STRIP_FLOATS = 10 * 1024;

// The inputs of a pair of output rows. Row `i` of the taps begins at `in + i * pitch`. The first
// output row has taps in rows 0 … taps[0] - 1, the second `shift` rows further down. Only rows
// `begin` … `end` - 1 are inside the map.
struct Rows {
  const float* in;
  ptrdiff_t pitch, step;  // between taps, down and across
  const float* weight;
  int64_t taps[2];
  int64_t shift, begin, end;
};

// R pixels of one output row, or of two with PAIR, with column stride SX.
template <int R, int SX, bool PAIR>
static VB_INLINE void sum(const Rows& rows, F bias, F (&first)[R], F (&second)[R]) {
  VB_UNROLL
  for (int r = 0; r < R; r++) first[r] = second[r] = bias;
  const int64_t across = rows.taps[1], row_weights = across * W;
  const int64_t last_first = std::min(rows.taps[0], rows.end);
  const auto alone = [&](int64_t begin, int64_t end, int64_t shift, F(&out)[R])
                         VB_INLINE_LAMBDA {
    for (int64_t i = begin; i < end; i++) {
      const float* in = rows.in + i * rows.pitch;
      const float* weight = rows.weight + (i - shift) * row_weights;
      for (int64_t k = 0; k < across; k++, in += rows.step, weight += W) {
        const F w = simd::in_register(simd::load(weight));
        VB_UNROLL
        for (int r = 0; r < R; r++) out[r] = simd::fma(w, simd::load(in + r * SX * W), out[r]);
      }
    }
  };
  if (!PAIR) {
    alone(rows.begin, last_first, 0, first);
    return;
  }
  alone(rows.begin, std::min(rows.shift, last_first), 0, first);
  for (int64_t i = std::max(rows.begin, rows.shift); i < last_first; i++) {
    const float* in = rows.in + i * rows.pitch;
    const float* weight = rows.weight + i * row_weights;
    const float* weight_above = weight - rows.shift * row_weights;
    for (int64_t k = 0; k < across; k++, in += rows.step, weight += W, weight_above += W) {
      const F w = simd::in_register(simd::load(weight)),
              v = simd::in_register(simd::load(weight_above));
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        const F x = simd::in_register(simd::load(in + r * SX * W));
        first[r] = simd::fma(w, x, first[r]);
        second[r] = simd::fma(v, x, second[r]);
      }
    }
  }
  alone(std::max({rows.begin, rows.shift, rows.taps[0]}), rows.end, rows.shift, second);
}

template <class T>
struct Output {
  T* first;
  T* second;  // null for a single row
  int64_t pixel;
  int lanes;
  int64_t activation;
};

template <class T, int R, int SX>
static void run(const Rows& rows, const float* bias_of_lanes, const Output<T>& out) {
  const F bias = simd::load(bias_of_lanes);
  F first[R], second[R];
  if (out.second) {
    sum<R, SX, true>(rows, bias, first, second);
  } else {
    sum<R, SX, false>(rows, bias, first, second);
  }
  for (int row = 0; row < (out.second ? 2 : 1); row++) {
    F(&x)[R] = row ? second : first;
    if (out.activation != activation::NONE) activation::apply<T>(x, R, out.activation);
    T* place = row ? out.second : out.first;
    VB_UNROLL
    for (int r = 0; r < R; r++) simd::put(place + r * out.pixel, x[r], out.lanes);
  }
}

template <class T>
using Run = void (*)(const Rows&, const float* bias, const Output<T>&);

template <class T>
static Run<T> run_of(int64_t pixels, int64_t stride) {
  static constexpr auto runs = variants<2>([](auto step) {
    return variants<MAX_RUN>([](auto r) { return run<T, r.value, decltype(step)::value>; });
  });
  return runs[stride != 1][pixels - 1];
}

// A task of one thread: some output rows of `W` channels of one image.
template <class T>
struct Task {
  const Problem& p;
  int64_t channel;
  int lanes;
  int64_t first_row, end_row;  // of the output
  const T* in;
  T* out;
};

// Copies the input rows of a task into a strip with zeros left and right, each channel as often as
// there are outputs of it. Returns the first row, and in `count` the number of rows.
template <class T>
static int64_t fill(const Task<T>& task, int64_t width, ScratchBuffer<float>& buffer,
                    int64_t* count) {
  const Problem& p = task.p;
  const int64_t first = std::max<int64_t>(0, task.first_row * p.stride[0] - p.padding[0]);
  const int64_t reach = (task.end_row - 1) * p.stride[0] - p.padding[0];
  const int64_t end = std::min(p.size[0], reach + (p.kernel[0] - 1) * p.dilation[0] + 1);
  *count = std::max<int64_t>(0, end - first);
  float* const strip = buffer.of(*count * width * W);
  const int64_t skipped = task.channel % p.multiplier;
  int32_t source[W];
  for (int l = 0; l < W; l++) source[l] = static_cast<int32_t>((skipped + l) / p.multiplier);
  const int inputs = source[task.lanes - 1] + 1;
  const int64_t inside = std::max<int64_t>(0, std::min(p.size[1], width - p.padding[1]));
  for (int64_t y = 0; y < *count; y++) {
    const T* in = task.in + (first + y) * p.in_stride[1];
    float* out = strip + y * width * W;
    float* const end_of_row = out + width * W;
    const int64_t left = std::min(p.padding[1], width);
    out = std::fill_n(out, left * W, 0.f);
    for (int64_t x = 0; x < inside; x++, in += p.in_stride[2], out += W) {
      const F pixel = simd::get(in, inputs);
      simd::store(out, p.multiplier == 1 ? pixel : simd::permute(pixel, source));
    }
    std::fill(out, end_of_row, 0.f);
  }
  return first;
}

template <class T>
static void convolve(const Task<T>& task, const float* weight, const float* bias,
                     ScratchBuffer<float>& buffer) {
  const Problem& p = task.p;
  const int64_t width = (p.out_size[1] - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
  int64_t count;
  const int64_t strip_row = fill(task, width, buffer, &count);
  const float* const strip = buffer.of(count * width * W);
  // Two output rows this far apart share the input rows of their taps.
  const int64_t apart = p.dilation[0] / std::gcd(p.stride[0], p.dilation[0]);
  const int64_t shift = apart * p.stride[0] / p.dilation[0];
  const int64_t runs_a_row = (p.out_size[1] + MAX_RUN - 1) / MAX_RUN;
  const int64_t pixels = (p.out_size[1] + runs_a_row - 1) / runs_a_row;
  const Run<T> run = run_of<T>(pixels, p.stride[1]);
  Rows rows{nullptr, p.dilation[0] * width * W, p.dilation[1] * W, weight,
            {p.kernel[0], p.kernel[1]}, shift, 0, 0};
  for (int64_t y = task.first_row; y < task.end_row; y++) {
    if ((y - task.first_row) / apart % 2) continue;  // done as the second row of a pair
    const bool pair = y + apart < task.end_row;
    const int64_t top = y * p.stride[0] - p.padding[0] - strip_row;  // of the taps, in the strip
    const int64_t d = p.dilation[0];
    rows.begin = top < 0 ? (-top + d - 1) / d : 0;
    rows.end = std::min(p.kernel[0] + (pair ? shift : 0),
                        count > top ? (count - top + d - 1) / d : 0);
    rows.end = std::max(rows.end, rows.begin);
    T* out = task.out + y * p.out_stride[1];
    for (int64_t x = 0; x < p.out_size[1]; x += pixels) {
      const int64_t at = std::min(x, p.out_size[1] - pixels);  // the last run may overlap
      rows.in = strip + (top * width + at * p.stride[1]) * W;
      T* first = out + at * p.out_stride[2];
      T* second = pair ? first + apart * p.out_stride[1] : nullptr;
      for (int64_t r = 0; r < pixels; r++) {
        memory::fetch<memory::WRITE>(first + r * p.out_stride[2], W);
        if (second) memory::fetch<memory::WRITE>(second + r * p.out_stride[2], W);
      }
      run(rows, bias, Output<T>{first, second, p.out_stride[2], task.lanes, p.activation});
    }
  }
}

// Output rows per task: as many as keep the strip in the cache, but at least the kernel's height,
// so that most of the strip is not copied several times.
static int64_t rows_a_task(const Problem& p) {
  const int64_t width = (p.out_size[1] - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
  const int64_t reach = (p.kernel[0] - 1) * p.dilation[0];
  const int64_t fitting = (STRIP_FLOATS / (width * W) - reach) / p.stride[0];
  const int64_t pairs = 2 * p.dilation[0];
  const int64_t rows = std::max({fitting, 2 * reach / p.stride[0], int64_t{8}});
  const int64_t whole = (rows + pairs - 1) / pairs * pairs;
  const int64_t bands = (p.out_size[0] + whole - 1) / whole;
  const int64_t even = (p.out_size[0] + bands - 1) / bands;
  return (even + pairs - 1) / pairs * pairs;
}

// [taps][channels] → [blocks of W channels][taps][W], padded with zeros.
static void pack(const Problem& p, const float* weight, float* out) {
  const int64_t taps = p.kernel[0] * p.kernel[1], blocks = (p.channels + W - 1) / W;
  for (int64_t t = 0; t < taps; t++) {
    for (int64_t b = 0; b < blocks; b++) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - b * W));
      simd::store(out + (b * taps + t) * W, simd::get(weight + t * p.channels + b * W, lanes));
    }
  }
}

static int64_t packed_size(const Problem& p) {
  return (p.channels + W - 1) / W * W * p.kernel[0] * p.kernel[1];
}

// Computes some output rows of one image for a block of `W` channels.
template <class T>
static void convolve_band(const Problem& p, const Tensors& tensors, const float* packed,
                          int64_t image, int64_t block, int64_t first, int64_t end) {
  static thread_local ScratchBuffer<float> strip;
  const int64_t channel = block * W;
  const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - channel));
  float bias[W] = {};
  if (tensors.bias) std::copy_n(tensors.bias + channel, lanes, bias);
  const Task<T> task{p,
                     channel,
                     lanes,
                     first,
                     end,
                     static_cast<const T*>(tensors.in) + image * p.in_stride[0] +
                         channel / p.multiplier,
                     static_cast<T*>(tensors.out) + image * p.out_stride[0] + channel};
  convolve(task, packed + channel * p.kernel[0] * p.kernel[1], bias, strip);
}

template <class T>
static void forward(const Problem& p, const Tensors& tensors) {
  static thread_local ScratchBuffer<float> packed;
  const int64_t blocks = (p.channels + W - 1) / W;
  const int64_t task_rows = rows_a_task(p), bands = (p.out_size[0] + task_rows - 1) / task_rows;
  float* const weights = packed.of(packed_size(p));
  pack(p, tensors.weight, weights);
  parallel::for_each(p.batch * bands * blocks, p.threads, [&](int64_t index) {
    const int64_t first = index / blocks % bands * task_rows;
    convolve_band<T>(p, tensors, weights, index / (blocks * bands), index % blocks, first,
                     std::min(first + task_rows, p.out_size[0]));
  });
}

}  // namespace depthwise
