// Depthwise convolution: the C interface, called from conv.py.
#include "depthwise/direct.h"

// Parallel depthwise convolutions of groups of a map's channels; other channels pass through. All
// branches proceed down the map together, so that rows are read and written while they are in the
// cache.
namespace depthwise {

// Smaller maps are already in the L2 cache.
constexpr int64_t FETCHED_BYTES = 2 << 20;

// Copies `count` channels of an output row. With `ahead`, prefetches for all branches the input
// that many rows further down, and the output.
template <class T>
static void pass_row(const Problem& p, const T* in, int64_t count, int64_t ahead, T* out) {
  for (int64_t x = 0; x < p.size[1]; x++, in += p.in_stride[2], out += p.out_stride[2]) {
    if (ahead) {
      memory::fetch<memory::READ>(in + ahead * p.in_stride[1], p.in_stride[2]);
      memory::fetch<memory::WRITE>(out + p.out_stride[1], p.out_stride[2]);
    }
    simd::copy(in, count, out);
  }
}

// Convolutions with stride 1 that keep the map's size, each of its own channels; the `passed`
// channels before those of the first are copied.
template <class T>
static void branches(const Problem* problems, const Tensors* tensors, int64_t count,
                     int64_t passed) {
  static thread_local std::vector<ScratchBuffer<float>> buffers;
  const Problem& p = problems[0];
  const bool fetches = p.batch * p.in_stride[0] * int64_t{sizeof(T)} > FETCHED_BYTES;
  int64_t ahead = 0, band_rows = p.size[0];
  std::vector<Taps> taps(count);
  if (buffers.size() < taps.size()) buffers.resize(count);
  for (int64_t i = 0; i < count; i++) {
    const Problem& q = problems[i];
    if (fetches) ahead = std::max(ahead, q.padding[0] + 1);
    band_rows = std::min(band_rows, rows_a_task(q));
    if (is_direct(q)) {
      taps[i] = taps_of<T>(tensors[i].weight, q.channels, q.channels, q.kernel[0], buffers[i]);
    } else {
      float* const packed = buffers[i].of(packed_size(q));
      pack(q, tensors[i].weight, packed);
      taps[i] = {packed, W};
    }
  }
  const int64_t rows = p.batch * p.size[0], threads = std::min(p.threads, rows);
  parallel::for_each(threads, threads, [&](int64_t index) {
    const int64_t last = rows * (index + 1) / threads;
    for (int64_t row = rows * index / threads, end; row < last; row = end) {
      const int64_t image = row / p.size[0], first = row % p.size[0];
      end = std::min({last, row + band_rows, (image + 1) * p.size[0]});
      const int64_t below = first + end - row;
      const T* const in = static_cast<const T*>(tensors[0].in) - passed + image * p.in_stride[0];
      T* const out = static_cast<T*>(tensors[0].out) - passed + image * p.out_stride[0];
      for (int64_t y = first; y < below; y++) {
        pass_row(p, in + y * p.in_stride[1], passed, ahead, out + y * p.out_stride[1]);
      }
      for (int64_t i = 0; i < count; i++) {
        if (is_direct(problems[i])) {
          convolve_rows<T>(problems[i], tensors[i], taps[i], image, {first, below});
          continue;
        }
        for (int64_t block = 0; block * W < problems[i].channels; block++) {
          convolve_band<T>(problems[i], tensors[i], taps[i].weight, image, block, first, below);
        }
      }
    }
  });
}

}  // namespace depthwise

// Depthwise convolution with large windows in bfloat16: products of pairs of neighbouring pixels
// and of taps. A strip as in depthwise.h holds the pixels in pairs. Outputs in even columns have
// taps (0, 1), (2, 3) …; those in odd columns have (none, 0), (1, 2) …, so that both read the same
// pairs. A pixel that is not finite also makes outputs NaN whose windows begin or end beside it.
namespace depthwise {

#if VB_PAIRS
using simd::Pairs;

constexpr int64_t LARGE_SIDE = 9;  // of a window, at least
constexpr int MAX_PAIRS = 7;       // of outputs in a row, with all sums in registers

static bool takes_pairs(const Problem& p) {
  bool fits = p.multiplier == 1 && p.out_size[1] % 2 == 0;
  for (int i = 0; i < 2; i++) {
    fits = fits && p.kernel[i] >= LARGE_SIDE && p.stride[i] == 1 && p.dilation[i] == 1;
  }
  return fits;
}

// Pairs of taps in a row of the window.
static int64_t steps_of(const Problem& p) { return p.kernel[1] / 2 + 1; }

// [rows][steps][even, odd][W] of a block of channels.
static void pack_taps(const Problem& p, const float* weight, int lanes, float* out) {
  const int64_t across = p.kernel[1];
  for (int64_t y = 0; y < p.kernel[0]; y++) {
    const auto tap = [&](int64_t k) {
      return k < 0 || k >= across ? simd::zero()
                                  : simd::get(weight + (y * across + k) * p.channels, lanes);
    };
    for (int64_t k = 0; k <= across; k += 2, out += 2 * W) {
      simd::store(out, Pairs::pack(tap(k), tap(k + 1)));
      simd::store(out + W, Pairs::pack(tap(k - 1), tap(k)));
    }
  }
}

// Copies input rows into a strip of `width` pairs, with zeros on both sides.
static void fill_pairs(const Task<BFloat16>& task, int64_t first, int64_t end, int64_t width,
                       float* strip) {
  const Problem& p = task.p;
  const BFloat16 outside[W] = {};
  for (int64_t y = first; y < end; y++) {
    const BFloat16* const in = task.in + y * p.in_stride[1];
    const auto pixel = [&](int64_t x) {
      return x < 0 || x >= p.size[1] ? outside : in + x * p.in_stride[2];
    };
    for (int64_t i = 0; i < width; i++, strip += W) {
      const int64_t x = 2 * i - p.padding[1];
      simd::store(strip, Pairs::pack(pixel(x), pixel(x + 1), task.lanes));
    }
  }
}

// The inputs of some pairs of outputs: window rows `begin` … `end` - 1 are inside the map.
struct PairedRun {
  const float* in;  // of the window's first row
  int64_t pitch, steps, begin, end;
  const float* weight;
};

template <int M>
static void run_pairs(const PairedRun& run, const float* bias, const Output<BFloat16>& out) {
  F even[M], odd[M];
  VB_UNROLL
  for (int m = 0; m < M; m++) even[m] = odd[m] = simd::load(bias);
  for (int64_t y = run.begin; y < run.end; y++) {
    const float* in = run.in + y * run.pitch;
    const float* weight = run.weight + y * run.steps * 2 * W;
    for (int64_t k = 0; k < run.steps; k++, in += W, weight += 2 * W) {
      const F a = simd::in_register(simd::load(weight));
      const F b = simd::in_register(simd::load(weight + W));
      VB_UNROLL
      for (int m = 0; m < M; m++) {
        const F x = simd::in_register(simd::load(in + m * W));
        Pairs::add_product(even[m], a, x);
        Pairs::add_product(odd[m], b, x);
      }
    }
  }
  if (out.activation != activation::NONE) {
    activation::apply<BFloat16>(even, M, out.activation);
    activation::apply<BFloat16>(odd, M, out.activation);
  }
  VB_UNROLL
  for (int m = 0; m < M; m++) {
    simd::put(out.first + 2 * m * out.pixel, even[m], out.lanes);
    simd::put(out.first + (2 * m + 1) * out.pixel, odd[m], out.lanes);
  }
}

// A task as of `convolve`. Neighbouring rows of a run of columns read the same part of the strip.
static void convolve_pairs(const Task<BFloat16>& task, const float* weight, const float* bias,
                           ScratchBuffer<float>& buffer) {
  const Problem& p = task.p;
  const int64_t outputs = p.out_size[1] / 2, width = outputs + p.kernel[1] / 2;
  const int64_t first = std::max<int64_t>(0, task.first_row - p.padding[0]);
  const int64_t end = std::min(p.size[0], task.end_row - 1 - p.padding[0] + p.kernel[0]);
  const int64_t count = std::max<int64_t>(0, end - first);
  float* const strip = buffer.of(count * width * W);
  fill_pairs(task, first, first + count, width, strip);
  const int64_t runs = (outputs + MAX_PAIRS - 1) / MAX_PAIRS, pairs = (outputs + runs - 1) / runs;
  static constexpr auto variants_of_run =
      variants<MAX_PAIRS>([](auto m) { return run_pairs<m.value>; });
  const auto run = variants_of_run[pairs - 1];
  for (int64_t x = 0; x < outputs; x += pairs) {
    const int64_t at = std::min(x, outputs - pairs);  // the last run may overlap
    for (int64_t y = task.first_row; y < task.end_row; y++) {
      const int64_t top = y - p.padding[0] - first;  // of the window, in the strip
      const int64_t begin = std::max<int64_t>(0, -top);
      const int64_t last = std::max(begin, std::min(p.kernel[0], count - top));
      BFloat16* const out = task.out + y * p.out_stride[1] + 2 * at * p.out_stride[2];
      for (int64_t r = 0; r < 2 * pairs; r++) {
        memory::fetch<memory::WRITE>(out + r * p.out_stride[2], W);
      }
      run({strip + (top * width + at) * W, width * W, steps_of(p), begin, last, weight}, bias,
          {out, nullptr, p.out_stride[2], task.lanes, p.activation});
    }
  }
}

static void forward_pairs(const Problem& p, const Tensors& t) {
  static thread_local ScratchBuffer<float> taps;
  const int64_t blocks = (p.channels + W - 1) / W;
  const int64_t task_rows = rows_a_task(p), bands = (p.out_size[0] + task_rows - 1) / task_rows;
  const int64_t of_block = p.kernel[0] * steps_of(p) * 2 * W;
  float* const packed = taps.of(blocks * of_block);
  const auto lanes_of = [&](int64_t block) {
    return static_cast<int>(std::min<int64_t>(W, p.channels - block * W));
  };
  for (int64_t b = 0; b < blocks; b++) {
    pack_taps(p, t.weight + b * W, lanes_of(b), packed + b * of_block);
  }
  parallel::for_each(p.batch * bands * blocks, p.threads, [&](int64_t index) {
    static thread_local ScratchBuffer<float> strip;
    const int64_t block = index % blocks, image = index / (blocks * bands);
    const int64_t first = index / blocks % bands * task_rows;
    const int lanes = lanes_of(block);
    float bias[W] = {};
    if (t.bias) std::copy_n(t.bias + block * W, lanes, bias);
    const Task<BFloat16> task{
        p, block * W, lanes, first, std::min(first + task_rows, p.out_size[0]),
        static_cast<const BFloat16*>(t.in) + image * p.in_stride[0] + block * W,
        static_cast<BFloat16*>(t.out) + image * p.out_stride[0] + block * W};
    convolve_pairs(task, packed + block * of_block, bias, strip);
  });
}
#endif

}  // namespace depthwise

extern "C" int depthwise_forward(const depthwise::Problem* problem, const depthwise::Tensors* tensors) {
#if VB_PAIRS
  if (problem->bfloat16 && depthwise::takes_pairs(*problem)) {
    return status_of([&] { depthwise::forward_pairs(*problem, *tensors); });
  }
#endif
  return status_of(problem->bfloat16, [&](auto type) {
    depthwise::forward_any<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int depthwise_branches(const depthwise::Problem* problems,
                                  const depthwise::Tensors* tensors, int64_t count,
                                  int64_t passed) {
  return status_of(problems->bfloat16, [&](auto type) {
    depthwise::branches<decltype(type)>(problems, tensors, count, passed);
  });
}
