// Dense convolutions as linear layers (im2col): the windows of some pixels at a time are copied
// into rows, which stay in the L2 cache.
#pragma once
#include <algorithm>
#include <cstdint>
#include "gemm/gemm.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace convolution {

// convolution.py fills in these fields.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel[2], stride[2], padding[2];
  int64_t activation, bfloat16, threads;
};

// Maps are [batch][height][width][channels]; `weight` is [out_channels][inputs of a window], packed
// by pack.h, with inputs in the order of the map. Void pointers are to float or BFloat16.
struct Tensors {
  const void *in, *weight;
  const float* bias;
  void* out;
};

constexpr int64_t STRIP_BYTES = 384 * 1024;
constexpr int64_t MIN_ROWS = 8 * linear::MAX_ROWS;  // multiplied each time the weights are read

constexpr int64_t AHEAD = 4;  // windows between the prefetch of inputs and their copy

// The window of an output pixel, with zeros beyond the map.
template <class T>
static void copy_window(const Problem& p, const T* image, int64_t y, int64_t x, T* out) {
  const int64_t top = y * p.stride[0] - p.padding[0], left = x * p.stride[1] - p.padding[1];
  const int64_t begin = std::clamp<int64_t>(-left, 0, p.kernel[1]) * p.channels;
  const int64_t end = std::clamp<int64_t>(p.width - left, 0, p.kernel[1]) * p.channels;
  const int64_t length = p.kernel[1] * p.channels;
  for (int64_t row = top; row < top + p.kernel[0]; row++, out += length) {
    if (row < 0 || row >= p.height || begin >= end) {
      std::fill_n(out, length, T{});
      continue;
    }
    const T* const in = image + (row * p.width + left) * p.channels;
    memory::fetch<memory::READ>(in + AHEAD * p.stride[1] * p.channels, length);
    std::fill_n(out, begin, T{});
    std::copy_n(in + begin, end - begin, out + begin);
    std::fill_n(out + end, length - end, T{});
  }
}

template <class T>
static void forward_of(const Problem& p, const Tensors& t) {
  static thread_local ScratchBuffer<T> buffer;
  constexpr int64_t line = linear::LINE / int64_t{sizeof(T)};
  const int64_t window = p.kernel[0] * p.kernel[1] * p.channels;
  // An odd number of cache lines, so that rows do not map to the same sets of the L1 cache.
  const int64_t pitch = (linear::round_up(window, line) / line | 1) * line;
  const int64_t fitting = std::max(MIN_ROWS, STRIP_BYTES / (pitch * int64_t{sizeof(T)}));
  const int64_t image_pixels = p.out_height * p.out_width, pixels = p.batch * image_pixels;
  const int64_t strips = (pixels + fitting * p.threads - 1) / (fitting * p.threads);
  T* const rows = buffer.of((pixels + strips - 1) / strips * pitch);
  for (int64_t i = 0; i < strips; i++) {
    const linear::Range strip = linear::share(pixels, i, strips);
    const int64_t count = strip.end - strip.begin;
    parallel::for_each(p.threads, p.threads, [&](int64_t index) {
      const linear::Range own = linear::share(count, index, p.threads);
      for (int64_t row = own.begin; row < own.end; row++) {
        const int64_t image = (strip.begin + row) / image_pixels;
        const int64_t pixel = (strip.begin + row) % image_pixels;
        const T* in = static_cast<const T*>(t.in) + image * p.height * p.width * p.channels;
        copy_window(p, in, pixel / p.out_width, pixel % p.out_width, rows + row * pitch);
      }
    });
    linear::Problem layer{};
    layer.rows = count;
    layer.in_features = window;
    layer.in_stride = pitch;
    layer.out_features = layer.out_stride = p.out_channels;
    layer.activation = p.activation;
    layer.threads = p.threads;
    linear::Tensors tensors{};
    tensors.in = rows;
    tensors.weight = t.weight;
    tensors.bias = t.bias;
    tensors.out = static_cast<T*>(t.out) + strip.begin * p.out_channels;
    linear::forward_of<T>(layer, tensors);
  }
}

static void forward(const Problem& p, const Tensors& t) {
  p.bfloat16 ? forward_of<BFloat16>(p, t) : forward_of<float>(p, t);
}

}  // namespace convolution
