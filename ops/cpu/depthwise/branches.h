// Parallel depthwise convolutions of groups of a map's channels; other channels pass through. All
// branches proceed down the map together, so that rows are read and written while they are in the
// cache.
#pragma once
#include "depthwise/direct.h"

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
  static thread_local ScratchBuffer<float> buffer;
  const Problem& p = problems[0];
  const bool fetches = p.batch * p.in_stride[0] * int64_t{sizeof(T)} > FETCHED_BYTES;
  int64_t ahead = 0, band_rows = p.size[0], packed_floats = 0;
  for (int64_t i = 0; i < count; i++) {
    if (fetches) ahead = std::max(ahead, problems[i].padding[0] + 1);
    band_rows = std::min(band_rows, rows_a_task(problems[i]));
    packed_floats += packed_size(problems[i]);
  }
  float* const packed = buffer.of(packed_floats);
  float* next = packed;
  for (int64_t i = 0; i < count; next += packed_size(problems[i++])) {
    pack(problems[i], tensors[i].weight, next);
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
      const float* weights = packed;
      for (int64_t i = 0; i < count; weights += packed_size(problems[i++])) {
        if (is_direct(problems[i])) {
          convolve_rows<T>(problems[i], tensors[i], image, {first, below});
          continue;
        }
        for (int64_t block = 0; block * W < problems[i].channels; block++) {
          convolve_band<T>(problems[i], tensors[i], weights, image, block, first, below);
        }
      }
    }
  });
}

}  // namespace depthwise
