// Packing of the caller's tensors (any strides, float32 or bfloat16) into the two layouts that the
// kernels read. For simd::Floats: "rows", [position][channel] with channels padded to whole
// vectors, and "columns", [channel][position]. For simd::Pairs, rows pair each position's channels
// with those of the next position, and columns pair two channels.
#pragma once
#include <algorithm>
#include <new>
#include <type_traits>

#include "common/dot.h"

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

template <class T>
static VB_INLINE void store_channels(const float* in, int channels, float scale, T* out) {
  const simd::F factor = simd::set1(scale);
  int c = 0;
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
// `store_channels` that bypasses the caches; requires `fills_lines`.
template <class T>
static VB_INLINE void stream_channels(const float* in, int channels, float scale, T* out) {
  const simd::F factor = simd::set1(scale);
  for (int c = 0; c < channels; c += simd::W) simd::stream(out + c, simd::load(in + c) * factor);
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

// Positions order[0..n-1] of one line of a tensor -> rows.
template <class T>
static void load_rows(const T* line, int64_t stride, const int* order, int n, int channels,
                      float scale, float* rows) {
  const int pitch = round_up(channels, simd::W);
  for (int i = 0; i < n; i++) {
    prefetch_positions(line, stride, order, n, channels, i + simd::W, 1);
    load_channels(line + order[i] * stride, channels, scale, rows + static_cast<size_t>(i) * pitch);
  }
}

// Positions order[0..n-1] of one line of a tensor, times `scale` -> columns, directly rather than
// via rows. Writes whole vectors from column -before on; excess columns repeat the first and the
// last position.
template <class T>
static void load_columns(const T* line, int64_t stride, const int* order, int n, int channels,
                         float scale, float* columns, size_t column_pitch, int before = 0) {
  for (int x = -before; x < n; x += simd::W) {
    const T* position[simd::W];
    for (int l = 0; l < simd::W; l++)
      position[l] = line + order[std::max(0, std::min(x + l, n - 1))] * stride;
    prefetch_positions(line, stride, order, n, channels, x + 2 * simd::W, simd::W);
    for (int c = 0; c < channels; c += simd::W) {
      const int count = std::min(simd::W, channels - c);
      float* out = columns + static_cast<ptrdiff_t>(c * column_pitch) + x;
      const float* rows[simd::W];
      if constexpr (std::is_same_v<T, float>) {
        if (count == simd::W) {
          for (int l = 0; l < simd::W; l++) rows[l] = position[l] + c;
          simd::transpose(rows, out, column_pitch, count, scale);
          continue;
        }
      }
      float tile[simd::W][simd::W];
      for (int l = 0; l < simd::W; l++) {
        load_channels(position[l] + c, count, scale, tile[l]);
        rows[l] = tile[l];
      }
      simd::transpose(rows, out, column_pitch, count);
    }
  }
}

#if VB_PAIRS
// Like `load_rows` for Pairs; the last position has no next one.
static inline void load_pair_rows(const BFloat16* line, int64_t stride, const int* order, int n,
                                  int channels, float* rows) {
  const int pitch = round_up(channels, simd::W);
  for (int i = 0; i < n; i++) {
    prefetch_positions(line, stride, order, n, channels, i + simd::W, 1);
    const BFloat16* first = line + order[i] * stride;
    const BFloat16* second = i + 1 < n ? line + order[i + 1] * stride : first;
    float* out = rows + static_cast<size_t>(i) * pitch;
    for (int c = 0; c < channels; c += simd::W)
      simd::store(out + c, simd::Pairs::pack(first + c, second + c, std::min(simd::W, channels - c)));
  }
}

static inline void load_pair_columns(const BFloat16* line, int64_t stride, const int* order, int n,
                                     int channels, float* columns, size_t column_pitch,
                                     int before = 0) {
  for (int x = -before; x < n; x += simd::W) {
    const BFloat16* position[simd::W];
    for (int l = 0; l < simd::W; l++)
      position[l] = line + order[std::max(0, std::min(x + l, n - 1))] * stride;
    prefetch_positions(line, stride, order, n, channels, x + 2 * simd::W, simd::W);
    for (int c = 0; c < channels; c += 2 * simd::W) {
      const int left = channels - c;
      float tile[simd::W][simd::W];
      const float* rows[simd::W];
      for (int l = 0; l < simd::W; l++) {
        rows[l] = reinterpret_cast<const float*>(position[l] + c);
        if (left >= 2 * simd::W) continue;
        std::memset(tile[l], 0, sizeof tile[l]);
        std::memcpy(tile[l], position[l] + c, left * sizeof(BFloat16));
        rows[l] = tile[l];
      }
      simd::F pairs[simd::W];
      simd::transpose(rows, pairs);
      float* out = columns + static_cast<ptrdiff_t>(c / 2 * column_pitch) + x;
      const int count = std::min(simd::W, (left + 1) / 2);
      for (int i = 0; i < count; i++) simd::store(out + i * column_pitch, pairs[i]);
    }
  }
}
#endif

// Loads either layout, in the operand type P.
template <class P, class T>
static void pack_rows(const T* line, int64_t stride, const int* order, int n, int channels,
                      float* rows) {
  if constexpr (P::COUNT == 1) {
    load_rows(line, stride, order, n, channels, 1.f, rows);
  } else {
    load_pair_rows(line, stride, order, n, channels, rows);
  }
}
// Multiplied by `scale` only for Floats.
template <class P, class T>
static void pack_columns(const T* line, int64_t stride, const int* order, int n, int channels,
                         float scale, float* columns, size_t column_pitch, int before = 0) {
  if constexpr (P::COUNT == 1) {
    load_columns(line, stride, order, n, channels, scale, columns, column_pitch, before);
  } else {
    load_pair_columns(line, stride, order, n, channels, columns, column_pitch, before);
  }
}

}  // namespace na
