// A map that is scanned in four orders: [batch][height * width][dim], and what a linear layer made
// of it, for each order the numbers of the steps, of B and of C.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/scratch.h"
#include "selective/problem.h"

namespace selective {

constexpr int ORDERS = 4;

struct MapTensors {
  const void *in, *projected;
  const float* weight;  // of the steps: [ORDERS][rank][dim]
  void* out;
};

// The pixels of consecutive tokens of an order: row by row, column by column, both in reverse.
static VB_INLINE void find_pixels(const Problem& p, int64_t order, const Span& span,
                                  int64_t (&pixels)[CHUNK]) {
  const bool back = order >= 2;
  const int64_t first = back ? p.tokens - 1 - span.first : span.first, step = back ? -1 : 1;
  if (order % 2 == 0) {
    for (int i = 0; i < span.count; i++) pixels[i] = first + i * step;
    return;
  }
  int64_t y = first % p.height, x = first / p.height;
  for (int i = 0; i < span.count; i++) {
    pixels[i] = y * p.width + x;
    y += step;
    if (y == p.height) y = 0, x++;
    if (y < 0) y = p.height - 1, x--;
  }
}

// delta of a chunk: the products of its numbers, [count][pitch], and weights, `weight_pitch` apart.
static VB_INLINE void multiply(const float* numbers, int64_t pitch, int count, const float* weight,
                               int64_t weight_pitch, int64_t rank, int lanes, float* out) {
  constexpr int TOKENS = 8;
  for (int i = 0; i < count; i += TOKENS) {  // rows up to CHUNK exist
    F sum[TOKENS];
    VB_UNROLL
    for (int j = 0; j < TOKENS; j++) sum[j] = simd::zero();
    for (int64_t r = 0; r < rank; r++) {
      const F w = simd::get(weight + r * weight_pitch, lanes);
      VB_UNROLL
      for (int j = 0; j < TOKENS; j++) {
        sum[j] = simd::fma(simd::set1(numbers[(i + j) * pitch + r]), w, sum[j]);
      }
    }
    VB_UNROLL
    for (int j = 0; j < TOKENS; j++) simd::store(out + (i + j) * W, sum[j]);
  }
}

// One image in all orders.
template <class T>
struct Map {
  static constexpr int PITCH = 1;
  static constexpr int STRIP = 4;  // blocks that share a chunk's numbers, at most
  static constexpr bool DIRECT = std::is_same_v<T, float>;
  const Problem& p;
  const MapTensors& t;
  int64_t image, group = 0;  // the order
  float* numbers = nullptr;  // of a chunk
  int64_t pixels[CHUNK] = {};

  static int64_t pitch(const Problem& p) { return simd::round_up(numbers_of(p), W); }
  static int64_t scratch(const Problem& p) { return CHUNK * pitch(p); }
  void keep(float* scratch) { numbers = scratch; }
  int64_t orders() const { return ORDERS; }
  void begin(int64_t order) { group = order; }

  // Finds the pixels of a chunk, for all that follows, too.
  VB_INLINE Shared share(const Span& span) {
    find_pixels(p, group, span, pixels);
    const int64_t count = numbers_of(p), step = pitch(p);
    const T* const in =
        static_cast<const T*>(t.projected) + (image * p.tokens * ORDERS + group) * count;
    for (int i = 0; i < span.count; i++) {
      const T* const from = in + pixels[i] * ORDERS * count;
      for (int64_t c = 0; c < count; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, count - c));
        simd::store(numbers + i * step + c, simd::get(from + c, lanes));
      }
    }
    return {numbers + p.rank, numbers + p.rank + p.states, step};
  }
  VB_INLINE void load(const Block& b, const Span& span, float* u, float* delta) {
    const T* const x = static_cast<const T*>(t.in) + image * p.tokens * p.dim + b.first;
    for (int i = 0; i < span.count; i++) {
      simd::store(u + i * W, simd::get(x + pixels[i] * p.dim, b.lanes));
    }
    const float* const weight = t.weight + group * p.rank * p.dim + b.first;
    multiply(numbers, pitch(p), span.count, weight, p.dim, p.rank, b.lanes, delta);
  }

  // Sums of all orders are in float32: DIRECTly in the result, or in a buffer until the end.
  T* out(int64_t channel) const {
    return static_cast<T*>(t.out) + image * p.tokens * p.dim + channel;
  }
  VB_INLINE void give(const Block& b, const Span& span, const Strip& strip, const float* sums) {
    float* to;
    int64_t step = p.dim;
    if constexpr (DIRECT) {
      to = out(b.first);
    } else {
      step = strip.blocks * W;
      to = buffer().of(p.tokens * step) + b.first - strip.first * W;
    }
    for (int i = 0; i < span.count; i++) {
      const F sum = simd::load(sums + i * W);
      float* const at = to + pixels[i] * step;
      simd::put(at, group ? sum + simd::get(at, b.lanes) : sum, b.lanes);
    }
  }
  void end(const Strip& strip) {
    if constexpr (!DIRECT) {
      const float* from = buffer().of(p.tokens * strip.blocks * W);
      for (int64_t i = 0; i < p.tokens; i++) {
        for (int64_t k = 0; k < strip.blocks; k++, from += W) {
          const Block b = block_of(p, group, strip.first + k);
          simd::put(out(b.first) + i * p.dim, simd::load(from), b.lanes);
        }
      }
    }
  }

 private:
  static ScratchBuffer<float>& buffer() {
    static thread_local ScratchBuffer<float> sums;
    return sums;
  }
};

}  // namespace selective
