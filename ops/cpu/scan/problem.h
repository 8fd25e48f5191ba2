// Gated linear attention on the CPU: what a call is given, and pieces of its sequences.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/lanes.h"
#include "common/prefetch.h"
#include "common/simd.h"

namespace gated_scan {

using simd::F;
using simd::W;

// gated_scan.py reads the fields of these from here.
struct Problem {
  int64_t batch, tokens, heads, dim, value_dim;
  int64_t apart;  // whether a token sees what came before it alone, and itself by the bonus
  int64_t bfloat16, threads;
  double scale;
};

// [batch][tokens][heads][channels], channels side by side, at these distances in elements.
struct Sequence {
  const void* data;
  int64_t batch, token, head;
};

constexpr int CHUNK = 16;  // tokens at a time, whose pieces stay in the first-level cache
constexpr float LOG2E = 1.44269504f;

// One head of one image.
struct Head {
  int64_t image, head;
};

template <class T>
static VB_INLINE const T* row(const Sequence& s, const Head& at, int64_t token) {
  return static_cast<const T*>(s.data) + at.image * s.batch + token * s.token + at.head * s.head;
}

// A chunk in the order of a direction: i-th is token `first` + i, or `first` - i.
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

// The chunks of a direction in its order.
static VB_INLINE Span chunk_of(int64_t index, int64_t tokens, bool backward) {
  const int64_t done = index * CHUNK;
  const int count = static_cast<int>(std::min<int64_t>(CHUNK, tokens - done));
  return backward ? Span{tokens - 1 - done, count, -1} : Span{done, count, 1};
}

// Where the values of a head's tokens go: out is [batch][tokens][heads][value_dim].
template <class T>
static VB_INLINE T* output_row(const Problem& p, void* out, const Head& at, int64_t token) {
  return static_cast<T*>(out) + ((at.image * p.tokens + token) * p.heads + at.head) * p.value_dim;
}

// Brings in where `begin` … `end` of a chunk's values go.
template <class T>
static void fetch_outputs(const Problem& p, void* out, const Head& at, const Span& span,
                          int64_t begin, int64_t end) {
  for (int i = 0; i < span.count; i++) {
    T* const row = output_row<T>(p, out, at, span.token(i));
    memory::fetch<memory::WRITE>(row + begin, end - begin);
  }
}

// Rows of a chunk times a number, as floats, zeros behind the last channel: [count][pitch].
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

// Brings rows of a chunk into the cache: those of a head lie apart, which the CPU doesn't foresee.
template <class T>
static void fetch(const Sequence& s, const Head& at, const Span& span, int64_t begin, int64_t end) {
  for (int i = 0; i < span.count; i++) {
    memory::fetch<memory::READ>(row<T>(s, at, span.token(i)) + begin, end - begin);
  }
}

}  // namespace gated_scan
