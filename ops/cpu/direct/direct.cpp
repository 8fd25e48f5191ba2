// Convolutions, dense or in groups of channels, that read windows where they lie in the map. For the
// linear kernel, pixels of an output row are rows, and the channels of a tap are inputs. Pixels at
// the left and right borders, whose windows lack columns, are taken together down the map. BFloat16
// is multiplied in pairs of channels.
#include "common/kernel.h"
#include "gemm/registers.h"

namespace direct {

using linear::Block;
using linear::MAX_ROWS;
using linear::PANEL;
using linear::Prefetch;
using simd::F;
using simd::W;

// direct_conv.py fills in these fields.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel[2], stride[2], padding[2];
  int64_t groups, activation, bfloat16, threads;

  int64_t inputs() const { return channels / groups; }  // of a group
  int64_t outputs() const { return out_channels / groups; }
};

// Maps are [batch][height][width][channels], of float or BFloat16; `weight` is, for each group,
// [outputs of a group][taps][inputs of a group], packed by pack.h as floats or pairs.
struct Tensors {
  const void *in, *weight;
  const float* bias;
  void* out;
};

// Bytes of the input that stay in the L2 cache while all weights are read.
constexpr int64_t BAND_BYTES = 512 * 1024;

// The taps of a window that are inside the map, in units of I.
template <class I>
struct Taps {
  Range rows, columns;
  int64_t across, inputs;  // columns of a window, inputs of a tap
  ptrdiff_t row, pixel;    // strides of the map
  const I* in;             // of the first pixel's window, which may begin outside the map
  const I* weight;
};

// R pixels and one panel.
template <class I, class T, int R, int V, bool HALF>
static void run(const linear::Problem& p, const Taps<I>& taps, const Block<T>& block,
                Prefetch& prefetch) {
  F sum[R][V];
  linear::start(block, sum);
  Prefetch fetched = prefetch;
  const auto fetch = [&]() VB_INLINE_LAMBDA { fetched.fetch(); };
  for (int64_t y = taps.rows.begin; y < taps.rows.end; y++) {
    for (int64_t x = taps.columns.begin; x < taps.columns.end; x++) {
      const I* const weight = taps.weight + (y * taps.across + x) * taps.inputs * V * W;
      linear::add_products<linear::STEP, HALF>(taps.in + y * taps.row + x * taps.pixel,
                                               p.in_stride, taps.inputs, weight, fetch, sum);
    }
  }
  prefetch = fetched;
  linear::finish<T, R, V>(p, block, sum);
}

template <class I, class T>
using Run = void (*)(const linear::Problem&, const Taps<I>&, const Block<T>&, Prefetch&);

template <class I, class T>
static Run<I, T> run_of(int64_t pixels, bool wide, int lanes) {
  static constexpr auto runs = variants<linear::HALVES>([](auto half) {
    return variants<2>([](auto v) {
      return variants<MAX_ROWS>([](auto r) {
        return run<I, T, r.value, decltype(v)::value, decltype(half)::value == 2>;
      });
    });
  });
  return runs[linear::is_half(lanes)][wide][pixels - 1];
}

// Some rows of an image, for one panel of a group's outputs.
template <class I, class T>
struct Task {
  const Problem& p;
  const Tensors& t;
  int64_t image, group, first;  // of the outputs
  Prefetch& prefetch;           // of the next panel's weights

  static constexpr int64_t NUMBERS = sizeof(I) / sizeof(T);

  // `count` output pixels whose windows lack the same taps, from (y, x) on to the right or down.
  void line(int64_t y, int64_t x, int64_t count, bool down) const {
    const int64_t inputs = p.inputs() / NUMBERS, outputs = p.outputs();
    const int64_t channel = group * outputs + first, rest = outputs - first;
    const bool wide = rest > W;
    const int lanes = static_cast<int>(std::min<int64_t>(W, wide ? rest - W : rest));
    const ptrdiff_t pixel = p.channels / NUMBERS, row = p.width * pixel;
    const int64_t top = y * p.stride[0] - p.padding[0], left = x * p.stride[1] - p.padding[1];
    Taps<I> taps{{std::max<int64_t>(0, -top), std::min(p.kernel[0], p.height - top)},
                 {std::max<int64_t>(0, -left), std::min(p.kernel[1], p.width - left)},
                 p.kernel[1], inputs, row, pixel, nullptr, nullptr};
    taps.weight = static_cast<const I*>(t.weight) +
                  (group * linear::padded(outputs) + first) * p.kernel[0] * p.kernel[1] * inputs;
    linear::Problem problem{};
    problem.in_stride = down ? p.stride[0] * row : p.stride[1] * pixel;
    problem.out_stride = down ? p.out_width * p.out_channels : p.out_channels;
    problem.activation = p.activation;
    const I* const in = static_cast<const I*>(t.in) +
                        (image * p.height + top) * row + left * pixel + group * inputs;
    T* const out = static_cast<T*>(t.out) + channel +
                   ((image * p.out_height + y) * p.out_width + x) * p.out_channels;
    const int64_t blocks = (count + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t i = 0; i < blocks; i++) {
      const Range range = share(count, i, blocks);
      taps.in = in + range.begin * problem.in_stride;
      const Block<T> block{nullptr, nullptr, t.bias + channel, nullptr,
                           out + range.begin * problem.out_stride, nullptr, lanes, nullptr};
      linear::fetch_outputs(problem, block, 0, length(range), wide ? PANEL : W);
      run_of<I, T>(length(range), wide, lanes)(problem, taps, block, prefetch);
    }
  }

  void run_rows(Range rows) const {
    const Range whole =
        inner_pixels(p.height, p.out_height, p.kernel[0], p.stride[0], p.padding[0]);
    const Range across =
        inner_pixels(p.width, p.out_width, p.kernel[1], p.stride[1], p.padding[1]);
    const int64_t begin = std::clamp(whole.begin, rows.begin, rows.end);
    const Range down{begin, std::clamp(whole.end, begin, rows.end)};
    for (int64_t y = rows.begin; y < rows.end; y++) {
      line(y, across.begin, length(across), false);
      if (y >= down.begin && y < down.end) continue;
      for (int64_t x = 0; x < across.begin; x++) line(y, x, 1, false);
      for (int64_t x = across.end; x < p.out_width; x++) line(y, x, 1, false);
    }
    for (int64_t x = 0; x < across.begin; x++) line(down.begin, x, length(down), true);
    for (int64_t x = across.end; x < p.out_width; x++) line(down.begin, x, length(down), true);
  }
};

template <class I, class T>
static void forward_of(const Problem& p, const Tensors& t) {
  const int64_t bytes = p.height * p.width * p.channels * int64_t{sizeof(T)};
  const int64_t wanted = std::max(p.threads, (bytes + BAND_BYTES - 1) / BAND_BYTES);
  const int64_t bands = std::min(p.out_height, wanted);
  const int64_t of_group = (p.outputs() + PANEL - 1) / PANEL, panels = p.groups * of_group;
  const int64_t taps = p.kernel[0] * p.kernel[1], inputs = p.inputs() / (sizeof(I) / sizeof(T));
  const int64_t size = std::min<int64_t>(PANEL, linear::padded(p.outputs())) * taps * inputs;
  const auto begin_of = [&](int64_t panel) {
    const int64_t row = panel / of_group * linear::padded(p.outputs()) + panel % of_group * PANEL;
    return static_cast<const I*>(t.weight) + row * taps * inputs;
  };
  parallel::for_each(p.batch * bands * panels, p.threads, [&](int64_t index) {
    const int64_t panel = index % panels;
    const Range rows = share(p.out_height, index / panels % bands, bands);
    const int64_t blocks = length(rows) * ((p.out_width + MAX_ROWS - 1) / MAX_ROWS);
    Prefetch prefetch(begin_of((panel + 1) % panels), size * int64_t{sizeof(I)},
                      std::max<int64_t>(1, blocks * taps * (inputs / linear::STEP)));
    const Task<I, T> task{p,         t, index / (panels * bands), panel / of_group,
                          panel % of_group * PANEL, prefetch};
    task.run_rows(rows);
  });
}

static void forward(const Problem& p, const Tensors& t) {
#if VB_BFLOAT16
  if (p.bfloat16) return forward_of<linear::Pair, BFloat16>(p, t);
#endif
  forward_of<float, float>(p, t);
}

}  // namespace direct

// The C interface, called from direct_conv.py.
// BFloat16 only if linear layers have products of it, see gemm.cpp.
extern "C" int direct_forward(const direct::Problem* problem, const direct::Tensors* tensors) {
  return status_of([&] { direct::forward(*problem, *tensors); });
}
