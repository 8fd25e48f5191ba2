// Resizes part of an 8-bit image in Pillow's fixed-point arithmetic, so that its pixels are Pillow's:
// rows first, rounded to 8 bits, then columns. Only the kept outputs are computed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include "common/interface.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace resize {

// resize.py fills in these fields.
struct Problem {
  int64_t height, width, channels;         // of the image
  int64_t out_height, out_width;           // of the part
  int64_t row_taps, column_taps;           // weights of an output along x and along y
  int64_t first_row, rows;                 // those that the part depends on
};

struct Tensors {
  const uint8_t* in;
  const int32_t *first_x, *weights_x;
  const int32_t *first_y, *weights_y;
  uint8_t* out;
};

constexpr int PRECISION = 22;  // fractional bits of a weight
constexpr int32_t HALF = 1 << (PRECISION - 1);

// Along an axis: output i is the sum of weights[i][k] * in[first[i] + k].
struct Axis {
  const int32_t *first, *weights;
  int64_t taps;
};

static VB_INLINE uint8_t rounded(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> PRECISION, 0, 255));
}

// Any number of channels: in [rows][width][channels] → [rows][out_width][channels].
static void resize_rows(const Problem& p, const uint8_t* in, const Axis& x, uint8_t* out) {
  for (int64_t row = 0; row < p.rows; row++) {
    const uint8_t* const from = in + row * p.width * p.channels;
    for (int64_t i = 0; i < p.out_width; i++) {
      const int64_t taps = std::min(x.taps, p.width - x.first[i]);
      for (int64_t c = 0; c < p.channels; c++) {
        int32_t sum = HALF;
        for (int64_t k = 0; k < taps; k++) {
          sum += x.weights[i * x.taps + k] * from[(x.first[i] + k) * p.channels + c];
        }
        *out++ = rounded(sum);
      }
    }
  }
}

// in [rows][out_width][channels] → [channels][out_height][out_width].
static void resize_columns(const Problem& p, const uint8_t* in, const Axis& y, int32_t* sums,
                           uint8_t* out) {
  const int64_t count = p.out_width * p.channels, plane = p.out_height * p.out_width;
  for (int64_t i = 0; i < p.out_height; i++) {
    const int64_t first = y.first[i] - p.first_row, taps = std::min(y.taps, p.rows - first);
    std::fill_n(sums, count, HALF);
    for (int64_t k = 0; k < taps; k++) {
      const uint8_t* const from = in + (first + k) * count;
      const int32_t weight = y.weights[i * y.taps + k];
      for (int64_t j = 0; j < count; j++) sums[j] += weight * from[j];
    }
    for (int64_t c = 0; c < p.channels; c++) {
      uint8_t* const to = out + c * plane + i * p.out_width;
      for (int64_t j = 0; j < p.out_width; j++) to[j] = rounded(sums[j * p.channels + c]);
    }
  }
}

}  // namespace resize

#if VB_AVX2 || VB_AVX512
#include "resize/rgb_x86.h"
#endif

namespace resize {

static void run(const Problem& p, const uint8_t* in, const Axis& x, const Axis& y, uint8_t* out) {
  in += p.first_row * p.width * p.channels;
#if VB_AVX2 || VB_AVX512
  if (p.channels == 3) return rgb::run(p, in, x, y, out);
#endif
  static thread_local ScratchBuffer<uint8_t> rows;
  static thread_local ScratchBuffer<int32_t> sums;
  const int64_t count = p.out_width * p.channels;
  uint8_t* const resized = rows.of(p.rows * count);
  resize_rows(p, in, x, resized);
  resize_columns(p, resized, y, sums.of(count), out);
}

}  // namespace resize

// The C interface, called from resize.py.
VB_EXPORT_BYTES(resize, Problem)
VB_EXPORT_BYTES(resize, Tensors)

extern "C" int resize_forward(const resize::Problem* problem, const resize::Tensors* t) {
  return status_of([&] {
    const resize::Axis x{t->first_x, t->weights_x, problem->row_taps};
    const resize::Axis y{t->first_y, t->weights_y, problem->column_taps};
    resize::run(*problem, t->in, x, y, t->out);
  });
}

// in [count][channels][pixels] of 8 bits → table[channel][value].
extern "C" int resize_look_up(int64_t count, int64_t channels, int64_t pixels, const uint8_t* in,
                              const float* tables, float* out) {
  for (int64_t plane = 0; plane < count * channels; plane++) {
    const float* const table = tables + plane % channels * 256;
    for (int64_t i = 0; i < pixels; i++) out[i] = table[in[i]];
    in += pixels, out += pixels;
  }
  return 0;
}
