// Packing of the caller's tensors (any strides, float32 or bfloat16) into the two layouts that the
// kernels read. For simd::Floats: "rows", [position][channel] with channels padded to whole
// vectors, and "columns", [channel][position]. For simd::Pairs, rows pair each position's channels
// with those of the next position, and columns pair two channels.
#pragma once
#include <new>
#include "common/dot.h"
#include "common/kernel.h"

namespace na {

using simd::round_up;

// A [B, Z, Y, X, H, C] tensor whose last stride is 1; strides are in elements.
struct Tensor {
  void* data;
  int64_t batch, z, y, x, head;

  int64_t at(int b, int iz, int iy, int h) const { return b * batch + iz * z + iy * y + h * head; }
};

// A growing scratch buffer, aligned to cache lines. New memory is zeroed, so that padding never
// contains NaN or denormals.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  float* get(size_t floats) {
    if (floats > size_) {
      release();
      data_ = static_cast<float*>(::operator new(floats * sizeof(float), ALIGNMENT));
      std::memset(data_, 0, floats * sizeof(float));
      size_ = floats;
    }
    return data_;
  }
  float* data() const { return data_; }

 private:
  void release() {
    ::operator delete(data_, ALIGNMENT);
    data_ = nullptr;
    size_ = 0;
  }
  static constexpr std::align_val_t ALIGNMENT{64};
  float* data_ = nullptr;
  size_t size_ = 0;
};

constexpr size_t CACHE_LINE = 64;
// Results larger than this, the size of a core's caches, are stored with non-temporal stores:
// readers would find little of them in the caches anyway.
constexpr int64_t STREAMED_BYTES = 8 << 20;

// Loads one position's channels, times `scale`, zero-padded to whole vectors.
template <class T>
static VB_INLINE void load_channels(const T* in, int channels, float scale, float* out) {
  const simd::F factor = simd::set1(scale);
  int c = 0;
  for (; c + simd::W <= channels; c += simd::W)
    simd::store(out + c, simd::load_as_float(in + c) * factor);
  if (c < channels) {
    float tail[simd::W] = {};
    for (int i = c; i < channels; i++) tail[i - c] = simd::to_float(in[i]) * scale;
    simd::store(out + c, simd::load(tail));
  }
}

// With `stream`, the stores bypass the caches, which requires `fills_lines`.
template <class T>
static VB_INLINE void store_channels(const float* in, int channels, float scale, T* out,
                                     bool stream = false) {
  const simd::F factor = simd::set1(scale);
  int c = 0;
  if (stream) {
    for (; c < channels; c += simd::W) simd::stream(out + c, simd::load(in + c) * factor);
    return;
  }
  for (; c + simd::W <= channels; c += simd::W)
    simd::store_from_float(out + c, simd::load(in + c) * factor);
  for (; c < channels; c++) simd::assign(out + c, in[c] * scale);
}

// Whether the channels of every position fill whole cache lines.
template <class T>
static inline bool fills_lines(const Tensor& t, int channels) {
  constexpr int64_t LINE = CACHE_LINE / sizeof(T);
  return reinterpret_cast<uintptr_t>(t.data) % CACHE_LINE == 0 && channels % LINE == 0 &&
         (t.batch | t.z | t.y | t.x | t.head) % LINE == 0;
}

// Prefetches `count` positions from order[first] on. Other heads lie between them, which defeats
// the hardware prefetcher.
template <class T>
static VB_INLINE void prefetch_positions(const T* line, int64_t stride, const int* order, int n,
                                         int channels, int first, int count) {
  for (int i = first; i < std::min(first + count, n); i++) {
    const char* p = reinterpret_cast<const char*>(line + order[i] * stride);
    for (size_t b = 0; b < channels * sizeof(T); b += CACHE_LINE) __builtin_prefetch(p + b);
  }
}

// Positions order[0..n-1] of one line of a tensor -> rows, Floats times `scale`. The last position
// has no next one, which Pairs need.
template <class P, class T>
static void pack_rows(const T* line, int64_t stride, const int* order, int n, int channels,
                      [[maybe_unused]] float scale, float* rows) {
  const int pitch = round_up(channels, simd::W);
  for (int i = 0; i < n; i++, rows += pitch) {
    prefetch_positions(line, stride, order, n, channels, i + simd::W, 1);
    const T* first = line + order[i] * stride;
    if constexpr (P::COUNT == 1) {
      load_channels(first, channels, scale, rows);
    } else {
      const T* second = i + 1 < n ? line + order[i + 1] * stride : first;
      for (int c = 0; c < channels; c += simd::W)
        simd::store(rows + c, P::pack(first + c, second + c, std::min(simd::W, channels - c)));
    }
  }
}

// Positions order[0..n-1] of one line of a tensor -> columns, Floats times `scale`, directly rather
// than via rows. Writes whole vectors from column -before on; excess columns repeat the first and
// the last position.
template <class P, class T>
static void pack_columns(const T* line, int64_t stride, const int* order, int n, int channels,
                         [[maybe_unused]] float scale, float* columns, size_t column_pitch,
                         int before = 0) {
  constexpr int STEP = P::COUNT * simd::W;
  for (int x = -before; x < n; x += simd::W) {
    const T* position[simd::W];
    for (int l = 0; l < simd::W; l++)
      position[l] = line + order[std::max(0, std::min(x + l, n - 1))] * stride;
    prefetch_positions(line, stride, order, n, channels, x + 2 * simd::W, simd::W);
    for (int c = 0; c < channels; c += STEP) {
      const int left = std::min(STEP, channels - c), count = simd::steps<P>(left);
      float* out = columns + static_cast<ptrdiff_t>(c / P::COUNT * column_pitch) + x;
      float tile[simd::W][simd::W];
      const float* rows[simd::W];
      if constexpr (P::COUNT == 2) {
        for (int l = 0; l < simd::W; l++) {
          rows[l] = reinterpret_cast<const float*>(position[l] + c);
          if (left == STEP) continue;
          std::memset(tile[l], 0, sizeof tile[l]);
          std::memcpy(tile[l], position[l] + c, left * sizeof(T));
          rows[l] = tile[l];
        }
        simd::F pairs[simd::W];
        simd::transpose(rows, pairs);
        for (int i = 0; i < count; i++) simd::store(out + i * column_pitch, pairs[i]);
        continue;
      }
      if constexpr (std::is_same_v<T, float>) {
        if (left == STEP) {
          for (int l = 0; l < simd::W; l++) rows[l] = position[l] + c;
          simd::transpose(rows, out, column_pitch, count, scale);
          continue;
        }
      }
      for (int l = 0; l < simd::W; l++) {
        load_channels(position[l] + c, count, scale, tile[l]);
        rows[l] = tile[l];
      }
      simd::transpose(rows, out, column_pitch, count);
    }
  }
}

}  // namespace na
