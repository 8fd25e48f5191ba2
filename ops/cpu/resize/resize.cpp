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

#if VB_AVX2 || VB_AVX512
// RGB images with AVX2: the same sums, of products of pairs. A weight is split into two 16-bit
// numbers, high * 2^SPLIT + low, since the instruction that multiplies and adds pairs takes those.
namespace rgb {

constexpr int SPLIT = 12;
constexpr int64_t BLOCK = 4;  // rows that share the loads of weights
constexpr int64_t PIXEL = 4;  // bytes of a pixel between the passes: RGB and one unused
constexpr int64_t GROUP = 4;  // taps per step along a row
constexpr int64_t PAST = 64;  // bytes that are read past the end of a row

static VB_INLINE int32_t pair_of(int32_t first, int32_t second) {
  const uint32_t low = static_cast<uint16_t>(first), high = static_cast<uint16_t>(second);
  return static_cast<int32_t>(low | high << 16);
}
static VB_INLINE int32_t low_of(int32_t weight) { return weight & ((1 << SPLIT) - 1); }
static VB_INLINE int32_t high_of(int32_t weight) { return weight >> SPLIT; }

// Per output and pair of taps: the pairs of the low parts, then of the high parts.
// `taps` is a multiple of the pairs' 2 and padded with zeros from `axis.taps` on.
static void split(const Axis& axis, int64_t outputs, int64_t taps, int32_t* low, int32_t* high) {
  for (int64_t i = 0; i < outputs; i++) {
    const int32_t* const w = axis.weights + i * axis.taps;
    for (int64_t k = 0; k < taps; k += 2) {
      const int32_t a = k < axis.taps ? w[k] : 0, b = k + 1 < axis.taps ? w[k + 1] : 0;
      *low++ = pair_of(low_of(a), low_of(b));
      *high++ = pair_of(high_of(a), high_of(b));
    }
  }
}

static VB_INLINE __m256i sum_of(__m256i low, __m256i high) {
  return _mm256_add_epi32(_mm256_slli_epi32(high, SPLIT), low);
}

// Each row of `in` → `out_width` pixels of four bytes.
static void resize_rows(const Problem& p, const uint8_t* in, const Axis& x, uint8_t* out) {
  static thread_local ScratchBuffer<uint8_t> lines;
  static thread_local ScratchBuffer<int32_t> lows, highs;
  const int64_t taps = simd::round_up(x.taps, GROUP), pairs = taps / 2;
  int32_t* const low = lows.of(p.out_width * pairs);
  int32_t* const high = highs.of(p.out_width * pairs);
  split(x, p.out_width, taps, low, high);
  const int64_t bytes = 3 * p.width, line = bytes + 3 * taps + PAST, to = p.out_width * PIXEL;
  uint8_t* const padded = lines.of(BLOCK * line);
  std::memset(padded, 0, BLOCK * line);
  // Taps 0 and 1 of R, G and B in 16 bits each, and in the upper lane taps 2 and 3.
  const __m256i spread = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m256i by_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const auto weights_at = [&](const int32_t* pair) VB_INLINE_LAMBDA {
    int64_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm256_permutevar8x32_epi32(_mm256_set1_epi64x(both), by_lane);
  };
  for (int64_t row = 0; row < p.rows; row += BLOCK) {
    const int64_t count = std::min(BLOCK, p.rows - row);
    for (int64_t r = 0; r < count; r++) std::memcpy(padded + r * line, in + (row + r) * bytes, bytes);
    for (int64_t i = 0; i < p.out_width; i++) {
      const uint8_t* const from = padded + 3 * static_cast<int64_t>(x.first[i]);
      __m256i lower[BLOCK], upper[BLOCK];
      VB_UNROLL
      for (int r = 0; r < BLOCK; r++) lower[r] = upper[r] = _mm256_setzero_si256();
      for (int64_t k = 0; k < taps; k += GROUP) {
        const __m256i w_low = weights_at(low + i * pairs + k / 2);
        const __m256i w_high = weights_at(high + i * pairs + k / 2);
        VB_UNROLL
        for (int r = 0; r < BLOCK; r++) {
          const __m128i pixels =
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * line + 3 * k));
          const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), spread);
          lower[r] = _mm256_add_epi32(lower[r], _mm256_madd_epi16(v, w_low));
          upper[r] = _mm256_add_epi32(upper[r], _mm256_madd_epi16(v, w_high));
        }
      }
      __m128i sums[BLOCK];
      VB_UNROLL
      for (int r = 0; r < BLOCK; r++) {
        const __m256i sum = sum_of(lower[r], upper[r]);
        const __m128i one =
            _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        sums[r] = _mm_srai_epi32(_mm_add_epi32(one, _mm_set1_epi32(HALF)), PRECISION);
      }
      alignas(16) uint8_t bytes_of[BLOCK * PIXEL];
      const __m128i packed = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]),
                                              _mm_packs_epi32(sums[2], sums[3]));
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes_of), packed);
      for (int64_t r = 0; r < count; r++) {
        std::memcpy(out + (row + r) * to + i * PIXEL, bytes_of + r * PIXEL, PIXEL);
      }
    }
  }
}

// Rows of pixels of four bytes, followed by a readable row → [3][out_height][out_width].
static void resize_columns(const Problem& p, const uint8_t* in, const Axis& y, uint8_t* out) {
  static thread_local ScratchBuffer<int32_t> lows, highs;
  const int64_t taps = simd::round_up(y.taps, 2), pairs = taps / 2;
  int32_t* const low = lows.of(p.out_height * pairs);
  int32_t* const high = highs.of(p.out_height * pairs);
  split(y, p.out_height, taps, low, high);
  const int64_t stride = p.out_width * PIXEL, plane = p.out_height * p.out_width;
  const __m128i by_channel =
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < p.out_height; i++) {
    const int64_t first = y.first[i] - p.first_row;
    // Taps past the last row have weights of 0, but their rows are read.
    const int64_t steps = std::min(pairs, (p.rows - first + 1) / 2);
    for (int64_t j = 0; j < p.out_width; j += 4) {
      const uint8_t* from = in + first * stride + j * PIXEL;
      __m256i lower[2], upper[2];
      lower[0] = lower[1] = upper[0] = upper[1] = _mm256_setzero_si256();
      for (int64_t k = 0; k < steps; k++, from += 2 * stride) {
        const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + stride));
        const __m256i w_low = _mm256_set1_epi32(low[i * pairs + k]);
        const __m256i w_high = _mm256_set1_epi32(high[i * pairs + k]);
        const __m256i v[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, next)),
                              _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, next))};
        VB_UNROLL
        for (int h = 0; h < 2; h++) {
          lower[h] = _mm256_add_epi32(lower[h], _mm256_madd_epi16(v[h], w_low));
          upper[h] = _mm256_add_epi32(upper[h], _mm256_madd_epi16(v[h], w_high));
        }
      }
      __m256i sums[2];
      VB_UNROLL
      for (int h = 0; h < 2; h++) {
        const __m256i sum = _mm256_add_epi32(sum_of(lower[h], upper[h]), _mm256_set1_epi32(HALF));
        sums[h] = _mm256_srai_epi32(sum, PRECISION);
      }
      // Packing interleaves lanes: pixels 0, 2, 1 and 3.
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[0], sums[1]), 0xd8);
      const __m128i pixels = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                              _mm256_extracti128_si256(words, 1));
      alignas(16) uint8_t channels[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(channels), _mm_shuffle_epi8(pixels, by_channel));
      const int64_t count = std::min<int64_t>(4, p.out_width - j);
      for (int c = 0; c < 3; c++) {
        std::memcpy(out + c * plane + i * p.out_width + j, channels + 4 * c, count);
      }
    }
  }
}

static void run(const Problem& p, const uint8_t* in, const Axis& x, const Axis& y, uint8_t* out) {
  static thread_local ScratchBuffer<uint8_t> buffer;
  uint8_t* const rows = buffer.of((p.rows + 1) * p.out_width * PIXEL + PAST);
  rgb::resize_rows(p, in, x, rows);
  rgb::resize_columns(p, rows, y, out);
}

}  // namespace rgb
#endif

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
