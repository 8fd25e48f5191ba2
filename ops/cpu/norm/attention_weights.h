// Weights of attention: softmax over products of queries and keys, to which a table is added first.
// The products are never stored.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "norm/softmax.h"

namespace weights {

using simd::F;
using simd::W;

// attention_weights.py fills in these fields. Channels of queries and keys of a depth are dense;
// strides are those of images, heads, and queries or depths.
struct Problem {
  int64_t batch, heads, queries, depth, keys;
  int64_t query_stride[3], key_stride[3];
  int64_t half_query, half_bias, half;  // which of query, table and result are in bfloat16
  int64_t threads;
};

// `key` is [batch][heads][depth][keys], `bias` [heads][queries][keys], `out` has images before that.
struct Tensors {
  const void* query;
  const float* key;
  const void* bias;
  void* out;
};

constexpr int64_t QUERIES = 64;  // of a task, for which keys are packed once
constexpr int VECTORS = 4;       // of keys at a time

// Products of R queries, [R][depth], and V vectors of keys, [depth][pitch]: [R][pitch].
template <int R, int V>
static VB_INLINE void multiply(int64_t depth, const float* query, const float* key, int64_t pitch,
                               float* out) {
  F sum[R][V];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) sum[r][v] = simd::zero();
  }
  for (int64_t k = 0; k < depth; k++, key += pitch) {
    F keys[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) keys[v] = simd::load(key + v * W);
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const F q = simd::set1(query[r * depth + k]);
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = simd::fma(q, keys[v], sum[r][v]);
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) simd::store(out + r * pitch + v * W, sum[r][v]);
  }
}

// All vectors from the c-th key on.
template <int R, int V = VECTORS>
static void multiply_all(int64_t depth, const float* query, const float* key, int64_t pitch,
                         float* out, int64_t c = 0) {
  for (; c + V * W <= pitch; c += V * W) multiply<R, V>(depth, query, key + c, pitch, out + c);
  if constexpr (V > 1) {
    if (c < pitch) multiply_all<R, V / 2>(depth, query, key, pitch, out, c);
  }
}

template <class Q, class B, class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t parts = (p.queries + QUERIES - 1) / QUERIES, pitch = simd::round_up(p.keys, W);
  const int64_t of_query = simd::round_up(p.depth, W);
  const F end = softmax::end_of(p.keys);
  parallel::for_each(p.batch * p.heads * parts, p.threads, [&](int64_t index) {
    static thread_local ScratchBuffer<float> buffer;
    float* const packed = buffer.of(p.depth * pitch + softmax::ROWS * (2 * pitch + of_query));
    float* const products = packed + p.depth * pitch;
    float* const kept = products + softmax::ROWS * pitch;
    float* const rows = kept + softmax::ROWS * pitch;
    const int64_t head = index / parts % p.heads, image = index / parts / p.heads;
    const float* const key = t.key + image * p.key_stride[0] + head * p.key_stride[1];
    for (int64_t k = 0; k < p.depth; k++) {
      for (int64_t c = 0; c < p.keys; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.keys - c));
        simd::store(packed + k * pitch + c, simd::get(key + k * p.key_stride[2] + c, lanes));
      }
    }
    const Q* const query = static_cast<const Q*>(t.query) + image * p.query_stride[0] +
                           head * p.query_stride[1];
    const B* const table = static_cast<const B*>(t.bias) + head * p.queries * p.keys;
    T* const out = static_cast<T*>(t.out) + (image * p.heads + head) * p.queries * p.keys;
    const int64_t begin = index % parts * QUERIES;
    softmax::each_rows(begin, std::min(begin + QUERIES, p.queries), [&](auto size, int64_t i) {
      constexpr int R = size.value;
      const B* bias[R];
      for (int r = 0; r < R; r++) {
        bias[r] = table + (i + r) * p.keys;
        const Q* const from = query + (i + r) * p.query_stride[2];
        // A row's last vector reaches into the next one, which is written later.
        for (int64_t k = 0; k < p.depth; k += W) {
          const int lanes = static_cast<int>(std::min<int64_t>(W, p.depth - k));
          simd::store(rows + r * p.depth + k, simd::get(from + k, lanes));
        }
      }
      multiply_all<R>(p.depth, rows, packed, pitch, products);
      softmax::of_rows<R>(p.keys, products, pitch, bias, end, kept, out + i * p.keys);
    });
  });
}

template <class Q, class B>
static void forward_from(const Problem& p, const Tensors& t) {
  p.half ? forward<Q, B, BFloat16>(p, t) : forward<Q, B, float>(p, t);
}

template <class Q>
static void forward_of(const Problem& p, const Tensors& t) {
  p.half_bias ? forward_from<Q, BFloat16>(p, t) : forward_from<Q, float>(p, t);
}

static void forward(const Problem& p, const Tensors& t) {
  p.half_query ? forward_of<BFloat16>(p, t) : forward_of<float>(p, t);
}

}  // namespace weights
