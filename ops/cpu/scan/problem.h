// Gated linear attention: the parameters of a call, and chunks of its sequences.
#pragma once
#include "common/kernel.h"

namespace gated_scan {

using simd::F;
using simd::W;

// gated_scan.py fills in the fields of these structures.
struct Problem {
  int64_t batch, tokens, heads, dim, value_dim;
  int64_t apart;  // whether a token sees only earlier tokens, and itself by the bonus
  int64_t bfloat16, threads;
  double scale;
};

// [batch][tokens][heads][channels] with dense channels and these strides in elements.
struct Sequence {
  const void* data;
  int64_t batch, token, head;
};

constexpr int CHUNK = 16;  // tokens at a time, which fit the L1 cache
constexpr float LOG2E = 1.44269504f;

// One head of one image.
struct Head {
  int64_t image, head;
};

template <class T>
static VB_INLINE const T* row(const Sequence& s, const Head& at, int64_t token) {
  return static_cast<const T*>(s.data) + at.image * s.batch + token * s.token + at.head * s.head;
}

// A chunk in the order of a direction: the i-th token is `first` + i, or `first` - i.
struct Span {
  int64_t first;
  int count, step;

  int64_t token(int i) const { return first + i * step; }
  Span share(int64_t index, int64_t shares) const {
    const int begin = static_cast<int>(count * index / shares);
    return {token(begin), static_cast<int>(count * (index + 1) / shares) - begin, step};
  }
  int64_t lowest() const { return step < 0 ? token(count - 1) : first; }
};

// The chunk with an index in the order of a direction.
static VB_INLINE Span chunk_of(int64_t index, int64_t tokens, bool backward) {
  const int64_t done = index * CHUNK;
  const int count = static_cast<int>(std::min<int64_t>(CHUNK, tokens - done));
  return backward ? Span{tokens - 1 - done, count, -1} : Span{done, count, 1};
}

// The destination of a head's values: out is [batch][tokens][heads][value_dim].
template <class T>
static VB_INLINE T* output_row(const Problem& p, void* out, const Head& at, int64_t token) {
  return static_cast<T*>(out) + ((at.image * p.tokens + token) * p.heads + at.head) * p.value_dim;
}

// Prefetches the destination of values `begin` … `end` of a chunk.
template <class T>
static void fetch_outputs(const Problem& p, void* out, const Head& at, const Span& span,
                          int64_t begin, int64_t end) {
  for (int i = 0; i < span.count; i++) {
    T* const row = output_row<T>(p, out, at, span.token(i));
    memory::fetch<memory::WRITE>(row + begin, end - begin);
  }
}

// Loads rows of a chunk, times a number, as floats padded with zeros: [count][pitch].
template <class T>
static void gather(const Sequence& s, const Head& at, const Span& span, int64_t begin, int64_t end,
                   float scale, float* out, int64_t pitch) {
  const F factor = simd::set1(scale);
  for (int i = 0; i < span.count; i++) {
    const T* in = row<T>(s, at, span.token(i));
    for (int64_t c = 0; c < pitch; c += W) {
      const int lanes = static_cast<int>(std::clamp<int64_t>(end - begin - c, 0, W));
      const F x = lanes ? simd::get(in + begin + c, lanes) : simd::zero();
      simd::store(out + i * pitch + c, x * factor);
    }
  }
}

// Prefetches rows of a chunk: a head's rows are far apart, which defeats the hardware prefetcher.
template <class T>
static void fetch(const Sequence& s, const Head& at, const Span& span, int64_t begin, int64_t end) {
  for (int i = 0; i < span.count; i++) {
    memory::fetch<memory::READ>(row<T>(s, at, span.token(i)) + begin, end - begin);
  }
}

}  // namespace gated_scan
