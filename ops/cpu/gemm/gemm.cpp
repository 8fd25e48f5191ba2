// Linear layers and convolutions: the C interface, called from linear.py, mlp.py and
// convolution.py.
#include "common/interface.h"
#include "gemm/gemm.h"

// Dense convolutions as linear layers (im2col): the windows of some pixels at a time are copied
// into rows, which stay in the L2 cache.
namespace convolution {

// convolution.py fills in these fields.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel[2], stride[2], padding[2];
  int64_t is_nchw, by_channel, activation, bfloat16, threads;
};

// The input is [batch][channels][height][width] if `is_nchw`. Other maps are
// [batch][height][width][channels]; `weight` is [out_channels][inputs of a window], packed by
// pack.h, with inputs in the order of such maps, or channel by channel if `by_channel`, which needs
// `is_nchw`. Void pointers are to float or BFloat16, with `weight_scale` that of the weight to int8;
// windows are then quantised as the rows of linear layers are (problem.h).
struct Tensors {
  const void *in, *weight;
  const float* bias;
  void* out;
  const float *weight_scale, *in_range;
};

constexpr int64_t STRIP_BYTES = 128 * 1024;  // per thread
constexpr int64_t MIN_ROWS = 8 * linear::MAX_ROWS;  // multiplied each time the weights are read

// The window of an output pixel, with `zero` beyond the map.
template <class T>
static void copy_window(const Problem& p, const T* image, int64_t y, int64_t x, T zero, T* out) {
  const int64_t top = y * p.stride[0] - p.padding[0], left = x * p.stride[1] - p.padding[1];
  const int64_t begin = std::clamp<int64_t>(-left, 0, p.kernel[1]) * p.channels;
  const int64_t end = std::clamp<int64_t>(p.width - left, 0, p.kernel[1]) * p.channels;
  const int64_t length = p.kernel[1] * p.channels;
  for (int64_t row = top; row < top + p.kernel[0]; row++, out += length) {
    if (row < 0 || row >= p.height || begin >= end) {
      std::fill_n(out, length, zero);
      continue;
    }
    const T* const in = image + (row * p.width + left) * p.channels;
    std::fill_n(out, begin, zero);
    simd::copy(in + begin, end - begin, out + begin);
    std::fill_n(out + end, length - end, zero);
  }
}

// The windows of output pixels `range` of a row `y`, where these do not reach beyond the map.
template <class T>
static void copy_inner_windows(const Problem& p, const T* image, int64_t y, linear::Range range,
                               int64_t pitch, T* out) {
  const int64_t left = range.begin * p.stride[1] - p.padding[1];
  const int64_t top = y * p.stride[0] - p.padding[0];
  const int64_t length = p.kernel[1] * p.channels, step = p.stride[1] * p.channels;
  for (int64_t row = top; row < top + p.kernel[0]; row++, out += length) {
    const T* const in = image + (row * p.width + left) * p.channels;
    for (int64_t i = 0; i < range.end - range.begin; i++) {
      simd::copy(in + i * step, length, out + i * pitch);
    }
  }
}

// The windows of output pixels `range`, counted over all images.
template <class T>
static void copy_windows(const Problem& p, const T* in, linear::Range range, int64_t pitch, T zero,
                         T* out) {
  const linear::Range rows = inner_pixels(p.height, p.out_height, p.kernel[0], p.stride[0],
                                          p.padding[0]);
  const linear::Range columns = inner_pixels(p.width, p.out_width, p.kernel[1], p.stride[1],
                                             p.padding[1]);
  for (int64_t pixel = range.begin; pixel < range.end;) {
    const int64_t line = pixel / p.out_width, y = line % p.out_height;
    const int64_t first = pixel % p.out_width;
    const int64_t last = std::min(p.out_width, first + range.end - pixel);
    const T* const image = in + line / p.out_height * p.height * p.width * p.channels;
    const bool inside = y >= rows.begin && y < rows.end;
    const int64_t begin = inside ? std::clamp(columns.begin, first, last) : last;
    const int64_t end = std::clamp(columns.end, begin, last);
    const auto copy = [&](int64_t x) {
      copy_window(p, image, y, x, zero, out + (x - first) * pitch);
    };
    for (int64_t x = first; x < begin; x++) copy(x);
    if (begin < end) {
      copy_inner_windows(p, image, y, {begin, end}, pitch, out + (begin - first) * pitch);
    }
    for (int64_t x = end; x < last; x++) copy(x);
    out += (last - first) * pitch;
    pixel += last - first;
  }
}

// The same for an image in NCHW, channel by channel.
template <class T>
static void copy_windows_by_channel(const Problem& p, const T* in, linear::Range range,
                                    int64_t pitch, T zero, T* out) {
  Problem plane = p;
  plane.channels = 1;
  for (int64_t c = 0; c < p.channels; c++) {
    copy_windows(plane, in + c * p.height * p.width, range, pitch, zero,
                 out + c * p.kernel[0] * p.kernel[1]);
  }
}

// Maps in NHWC, or with `by_channel` one image in NCHW, of T or of bytes.
template <class T, class In>
static void multiply_windows(const Problem& p, const Tensors& t, const In* in, In zero) {
  static thread_local ScratchBuffer<In> buffer;
  constexpr int64_t line = linear::LINE / int64_t{sizeof(In)};
  const int64_t window = p.kernel[0] * p.kernel[1] * p.channels;
  const bool as_floats = linear::has_tiles() && !t.weight_scale;
  const T* const type = nullptr;
  const int64_t padded = as_floats ? linear::padded_inputs(type, window) : window;
  // An odd number of cache lines, so that rows do not map to the same sets of the L1 cache.
  const int64_t pitch = (linear::round_up(padded, line) / line | 1) * line;
  const int64_t fitting = std::max(MIN_ROWS, STRIP_BYTES / (pitch * int64_t{sizeof(In)}));
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t strips = (pixels + fitting * p.threads - 1) / (fitting * p.threads);
  const int64_t longest = (pixels + strips - 1) / strips;
  In* const rows = buffer.of((longest + linear::TILE_ROWS) * pitch);
  for (int64_t row = 0; row < longest; row++) {
    std::fill(rows + row * pitch + window, rows + row * pitch + padded, In{});
  }
  for (int64_t i = 0; i < strips; i++) {
    const linear::Range strip = linear::share(pixels, i, strips);
    const int64_t count = strip.end - strip.begin;
    parallel::for_each(p.threads, p.threads, [&](int64_t index) {
      const linear::Range own = linear::share(count, index, p.threads);
      const auto copy = p.by_channel ? copy_windows_by_channel<In> : copy_windows<In>;
      copy(p, in, {strip.begin + own.begin, strip.begin + own.end}, pitch, zero,
           rows + own.begin * pitch);
    });
    linear::Problem layer{};
    layer.rows = count;
    layer.in_features = padded;
    layer.in_stride = pitch;
    layer.out_features = layer.out_stride = p.out_channels;
    layer.activation = p.activation;
    layer.threads = p.threads;
    linear::Tensors tensors{};
    if constexpr (std::is_same_v<In, T>) {
      tensors.in = rows;
    } else {
      tensors.bytes = rows;
    }
    tensors.weight = t.weight;
    tensors.bias = t.bias;
    tensors.weight_scale = t.weight_scale;
    tensors.in_range = t.in_range;
    tensors.out = static_cast<T*>(t.out) + strip.begin * p.out_channels;
    linear::forward<T>(layer, tensors);
  }
}

// Maps in NHWC. In int8 with a range, pixels are quantised once instead of with each of their
// windows, unless a value is not finite: then the windows that have it are NaN, and no others.
template <class T>
static void multiply_map(const Problem& p, const Tensors& t) {
  const T* const in = static_cast<const T*>(t.in);
#if VB_BYTES
  const bool overlap = p.kernel[0] * p.kernel[1] > p.stride[0] * p.stride[1];
  if (t.weight_scale && t.in_range && overlap) {
    static thread_local ScratchBuffer<uint8_t> buffer;
    const int64_t count = p.batch * p.height * p.width * p.channels;
    uint8_t* const bytes = buffer.of(linear::round_up(count, linear::AT_ONCE) + linear::AT_ONCE);
    uint8_t* const zeros = bytes + linear::round_up(count, linear::AT_ONCE);
    const T none{};
    linear::quantise_all(&none, 1, t.in_range, 1, zeros);
    if (linear::quantise_all(in, count, t.in_range, p.threads, bytes)) {
      return multiply_windows<T>(p, t, bytes, *zeros);
    }
  }
#endif
  multiply_windows<T>(p, t, in, T{});
}

// A row of a map in NCHW, pixel by pixel. C is the number of channels, or 0 for any.
template <int C, class T>
static void interleave(const T* in, int64_t channels, int64_t plane, int64_t width,
                       T* __restrict out) {
  if (C) channels = C;
  for (int64_t x = 0; x < width; x++) {
    for (int64_t c = 0; c < channels; c++) out[x * channels + c] = in[c * plane + x];
  }
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  if (!p.is_nchw) return multiply_map<T>(p, t);
  static thread_local ScratchBuffer<T> buffer;
  const int64_t plane = p.height * p.width, row = p.width * p.channels;
  T* const map = p.by_channel ? nullptr : buffer.of(plane * p.channels);
  Problem of_image = p;
  of_image.batch = 1;
  Tensors tensors = t;
  for (int64_t image = 0; image < p.batch; image++) {
    const T* const in = static_cast<const T*>(t.in) + image * plane * p.channels;
    if (!p.by_channel) {
      parallel::for_each(p.height, p.threads, [&](int64_t y) {
        const auto copy = p.channels == 3 ? interleave<3, T> : interleave<0, T>;
        copy(in + y * p.width, p.channels, plane, p.width, map + y * row);
      });
    }
    const int64_t done = image * p.out_height * p.out_width * p.out_channels;
    tensors.out = static_cast<T*>(t.out) + done;
    multiply_windows<T>(of_image, tensors, p.by_channel ? in : map, T{});
  }
}

}  // namespace convolution

// Whether this CPU has products of bfloat16; if not, layers convert it to float32.
extern "C" int linear_multiplies_bfloat16() { return VB_BFLOAT16; }

// The number of elements of a packed weight.
extern "C" int64_t linear_packed_size(int64_t out_features, int64_t in_features, int bfloat16) {
  return bfloat16 ? linear::packed_size(static_cast<BFloat16*>(nullptr), out_features, in_features)
                  : linear::packed_size(static_cast<float*>(nullptr), out_features, in_features);
}

extern "C" void linear_pack(const void* weight, int64_t out_features, int64_t in_features,
                            int bfloat16, void* out) {
  with_type(bfloat16, [&](auto type) {
    using T = decltype(type);
    linear::pack(static_cast<const T*>(weight), out_features, in_features, static_cast<T*>(out));
  });
}

// Whether this CPU multiplies int8.
extern "C" int linear_multiplies_bytes() { return linear::has_int8_products(); }

extern "C" int64_t linear_packed_bytes(int64_t out_features, int64_t in_features) {
  return linear::packed_bytes(out_features, in_features);
}

extern "C" void linear_pack_bytes(const int8_t* weight, int64_t out_features, int64_t in_features,
                                  int8_t* out) {
  linear::pack(weight, out_features, in_features, out);
}

extern "C" int linear_forward(const linear::Problem* problem, const linear::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    linear::forward<decltype(type)>(*problem, *tensors);
  });
}

// Two layers in sequence; the intermediate is never materialised.
extern "C" int linear_forward_pair(const linear::Problem* first, const linear::Tensors* before,
                                   const linear::Problem* second, const linear::Tensors* after) {
  return status_of(first->bfloat16, [&](auto type) {
    linear::forward_pair<decltype(type)>(*first, *before, *second, *after);
  });
}

extern "C" int convolution_forward(const convolution::Problem* problem,
                                   const convolution::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    convolution::forward<decltype(type)>(*problem, *tensors);
  });
}
