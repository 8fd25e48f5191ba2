// Converts maps from NHWC to NCHW with a fused affine, and back with a fused shortcut.
#include "common/kernel.h"

namespace nchw {

using simd::F;
using simd::W;

// nchw.py fills in these fields.
struct Problem {
  int64_t batch, channels, pixels;
  int64_t bfloat16, threads;
};

// Pixels per task: whole cache lines of a plane.
constexpr int64_t TASK_PIXELS = 4 * W;

// A tile of one image: `lanes` channels from `channel` on, `count` pixels from `pixel` on.
struct Tile {
  int64_t channel, pixel;
  int lanes, count;
};

// Calls run(image, tile) for all tiles.
template <class Run>
static void for_each_tile(const Problem& p, const Run& run) {
  const int64_t parts = (p.pixels + TASK_PIXELS - 1) / TASK_PIXELS;
  parallel::for_each(p.batch * parts, p.threads, [&](int64_t index) {
    const int64_t first = index % parts * TASK_PIXELS;
    const int64_t end = std::min(p.pixels, first + TASK_PIXELS);
    for (int64_t c = 0; c < p.channels; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - c));
      for (int64_t pixel = first; pixel < end; pixel += W) {
        const int count = static_cast<int>(std::min<int64_t>(W, end - pixel));
        run(index / parts, Tile{c, pixel, lanes, count});
      }
    }
  });
}

// Transposes `rows` of W numbers, with zeros past `count`, into columns.
template <class Row>
static VB_INLINE void transposed(const Row& row, int count, F (&columns)[W]) {
  alignas(64) float tile[W][W];
  const float* rows[W];
  for (int l = 0; l < W; l++) {
    simd::store(tile[l], l < count ? row(l) : simd::zero());
    rows[l] = tile[l];
  }
  simd::transpose(rows, columns);
}

// in [batch][pixels][channels] → in * scale + shift, [batch][channels][pixels].
template <class T>
static void from_nhwc(const Problem& p, const T* in, const float* scale, const float* shift, T* out) {
  for_each_tile(p, [&](int64_t image, const Tile& tile) {
    const int64_t offset = image * p.pixels * p.channels;
    const T* const from = in + offset + tile.pixel * p.channels + tile.channel;
    F columns[W];
    const F factor = simd::get(scale + tile.channel, tile.lanes);
    const F term = simd::get(shift + tile.channel, tile.lanes);
    transposed(
        [&](int l) VB_INLINE_LAMBDA {
          return simd::fma(simd::get(from + l * p.channels, tile.lanes), factor, term);
        },
        tile.count, columns);
    T* const to = out + offset + tile.channel * p.pixels + tile.pixel;
    for (int i = 0; i < tile.lanes; i++) simd::put(to + i * p.pixels, columns[i], tile.count);
  });
}

// in [batch][channels][pixels] + other → [batch][pixels][channels], the layout of `other`.
template <class T>
static void to_nhwc(const Problem& p, const T* in, const T* other, T* out) {
  for_each_tile(p, [&](int64_t image, const Tile& tile) {
    const int64_t offset = image * p.pixels * p.channels;
    const T* const from = in + offset + tile.channel * p.pixels + tile.pixel;
    F columns[W];
    transposed(
        [&](int l) VB_INLINE_LAMBDA { return simd::get(from + l * p.pixels, tile.count); },
        tile.lanes, columns);
    const int64_t place = offset + tile.pixel * p.channels + tile.channel;
    for (int i = 0; i < tile.count; i++) {
      const F shortcut = simd::get(other + place + i * p.channels, tile.lanes);
      simd::put(out + place + i * p.channels, columns[i] + shortcut, tile.lanes);
    }
  });
}

}  // namespace nchw

// The C interface, called from nchw.py.
extern "C" int nchw_from_nhwc(const nchw::Problem* problem, const void* in, const float* affine,
                              void* out) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    nchw::from_nhwc(*problem, static_cast<const T*>(in), affine, affine + problem->channels,
                    static_cast<T*>(out));
  });
}

extern "C" int nchw_to_nhwc(const nchw::Problem* problem, const void* in, const void* other,
                            void* out) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    nchw::to_nhwc(*problem, static_cast<const T*>(in), static_cast<const T*>(other),
                  static_cast<T*>(out));
  });
}
