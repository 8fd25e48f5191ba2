// Sequences of a selective scan: (B, groups, channels or states, L), tokens next to each other.
#pragma once
#include <algorithm>
#include <cstdint>
#include "selective/problem.h"

namespace selective {

// Strides in elements; those of rows are between channels, or between states.
struct Rows {
  const void* data;
  int64_t batch, group, row;
};

template <class T>
static VB_INLINE const T* row_of(const Rows& rows, int64_t image, int64_t group, int64_t row) {
  return static_cast<const T*>(rows.data) + image * rows.batch + group * rows.group +
         row * rows.row;
}

// Rows this far apart are in one set of the L1 cache, which holds 8 or 12 lines.
constexpr int64_t SET_BYTES = 4096;
constexpr int L2 = 2;  // where a chunk of so many rows is prefetched to, for the same reason

// A chunk of W rows, or of fewer and zeros, transposed: [CHUNK][W]. A transpose reads a line of each
// row several times, so that those of one set are copied first.
template <class T>
static VB_INLINE void gather(const T* in, int64_t pitch, int lanes, int count, float* out) {
  for (int i = 0; i < count; i += W) {
    const int tokens = std::min(W, count - i);
    if constexpr (std::is_same_v<T, float>) {
      if (lanes == W && tokens == W && pitch * sizeof(T) % SET_BYTES != 0) {
        simd::transpose(in + i, pitch, out + i * W, W, W);
        continue;
      }
    }
    float copied[W][W];
    for (int l = 0; l < W; l++) {
      simd::store(copied[l], l < lanes ? simd::get(in + l * pitch + i, tokens) : simd::zero());
    }
    simd::transpose(copied[0], W, out + i * W, W, W);
  }
}

// The reverse.
template <class T>
static VB_INLINE void scatter(const float* in, int lanes, int count, T* out, int64_t pitch) {
  for (int i = 0; i < count; i += W) {
    const int tokens = std::min(W, count - i);
    const float* rows[W];
    F columns[W];
    VB_UNROLL
    for (int j = 0; j < W; j++) rows[j] = in + (i + j) * W;
    simd::transpose(rows, columns);
    if (lanes == W && tokens == W) {
      VB_UNROLL
      for (int l = 0; l < W; l++) simd::store_from_float(out + l * pitch + i, columns[l]);
    } else {
      float copied[W][W];
      for (int l = 0; l < W; l++) simd::store(copied[l], columns[l]);
      for (int l = 0; l < lanes; l++) simd::put(out + l * pitch + i, simd::load(copied[l]), tokens);
    }
  }
}

// A chunk of rows of B or C as floats: [states][CHUNK].
template <class T>
static VB_INLINE void load_shared(const T* in, int64_t pitch, int64_t states, int count,
                                  float* out) {
  for (int64_t n = 0; n < states; n++) {
    for (int i = 0; i < count; i += W) {
      simd::store(out + n * CHUNK + i, simd::get(in + n * pitch + i, std::min(W, count - i)));
    }
  }
}

struct SequenceTensors {
  Rows u, delta, before, after;  // the last two are B and C
  void* out;                     // [batch][groups * dim][tokens]
};

// One group of one image.
template <class T>
struct Sequences {
  static constexpr int PITCH = CHUNK;
  static constexpr int STRIP = 1;  // blocks that share a chunk's numbers
  const Problem& p;
  const SequenceTensors& t;
  int64_t image, group;
  float* shared = nullptr;  // [2][states][CHUNK]

  static int64_t scratch(const Problem& p) { return 2 * p.states * CHUNK; }
  void keep(float* scratch) { shared = scratch; }
  int64_t orders() const { return 1; }
  void begin(int64_t) {}
  const T* row(const Rows& rows, int64_t at) const { return row_of<T>(rows, image, group, at); }

  Shared share(const Span&) const { return {shared, shared + p.states * CHUNK, 1}; }
  // B and C last: what they wait for overlaps with what u and delta wait for.
  VB_INLINE void load(const Block& b, const Span& span, float* u, float* delta) {
    gather(row(t.u, b.first) + span.first, t.u.row, b.lanes, span.count, u);
    gather(row(t.delta, b.first) + span.first, t.delta.row, b.lanes, span.count, delta);
    float* const after = shared + p.states * CHUNK;
    load_shared(row(t.before, 0) + span.first, t.before.row, p.states, span.count, shared);
    load_shared(row(t.after, 0) + span.first, t.after.row, p.states, span.count, after);
    fetch(b, span.first + CHUNK);
  }
  VB_INLINE void give(const Block& b, const Span& span, const Strip&, const float* sums) {
    scatter(sums, b.lanes, span.count, out(b) + span.first, p.tokens);
  }
  void end(const Strip&) {}

 private:
  T* out(const Block& b) const {
    return static_cast<T*>(t.out) + ((image * p.groups + group) * p.dim + b.first) * p.tokens;
  }
  // Prefetches the chunk from a token on: so many rows defeat the hardware prefetcher. Of the next
  // block, whose rows need not be close, it prefetches two rows at a time.
  VB_INLINE void fetch(const Block& b, int64_t first) {
    const T *const u = row(t.u, b.first), *const delta = row(t.delta, b.first);
    T* const to = out(b);
    const auto fetch_row = [&](int64_t l, int64_t token) VB_INLINE_LAMBDA {
      __builtin_prefetch(u + l * t.u.row + token, memory::READ, L2);
      __builtin_prefetch(delta + l * t.delta.row + token, memory::READ, L2);
      __builtin_prefetch(to + l * p.tokens + token, memory::WRITE, L2);
    };
    const int64_t next = W + 2 * (first / CHUNK - 1);
    for (int64_t l = next; l < std::min<int64_t>(next + 2, 2 * W); l++) {
      fetch_row(l, 0);
      fetch_row(l, std::min<int64_t>(CHUNK, p.tokens) - 1);
    }
    const bool ends = first >= p.tokens;
    // In the line that a chunk enters; after the last block, of the next group.
    const int64_t last = std::min(first + CHUNK, p.tokens) - 1;
    if (!ends) {
      for (int l = 0; l < b.lanes; l++) fetch_row(l, last);
    } else if (b.first + W < p.dim) {
      return;
    }
    for (int64_t n = 0; n < p.states; n++) {
      __builtin_prefetch(row(t.before, n) + (ends ? t.before.group : last));
      __builtin_prefetch(row(t.after, n) + (ends ? t.after.group : last));
    }
  }
};

}  // namespace selective
