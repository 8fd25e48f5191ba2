// Keys that are linear maps of others, and the products of queries with them.
#pragma once
#include "common/dot.h"
#include "norm/softmax.h"

namespace weights {

using simd::F;
using simd::W;

// attention.py fills in these fields. Channels of queries are dense; strides are those of images,
// heads, and queries, or channels and places.
struct Problem {
  int64_t batch, heads, queries, depth, places, keys;
  int64_t query_stride[3], key_stride[4];
  int64_t half_bias;  // whether the table is in bfloat16
};

constexpr int VECTORS = 4;  // of keys at a time

// Products of R queries, [R][depth], and keys, [depth][pitch], from the c-th key on, of Floats or of
// Pairs of channels. Sums of a vector of keys begin with begin(r, c) and are passed to
// finish(r, c, sum).
template <int R, class P = simd::Floats, int V = VECTORS, class Begin, class Finish>
static VB_INLINE void multiply(int64_t depth, const float* query, const float* key, int64_t pitch,
                               const Begin& begin, const Finish& finish, int64_t c = 0) {
  for (; c + V * W <= pitch; c += V * W) {
    F sum[R][V];
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = begin(r, c + v * W);
    }
    const float* from = key + c;
    for (int64_t k = 0; k < depth; k++, from += pitch) {
      F keys[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) keys[v] = simd::load(from + v * W);
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        const F q = simd::set1(query[r * depth + k]);
        VB_UNROLL
        for (int v = 0; v < V; v++) P::add_product(sum[r][v], q, keys[v]);
      }
    }
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) finish(r, c + v * W, sum[r][v]);
    }
  }
  if constexpr (V > 1) {
    if (c < pitch) multiply<R, P, V / 2>(depth, query, key, pitch, begin, finish, c);
  }
}

// Maps the keys of a head: [depth][pitch]. `scratch` is [places][pitch + depth].
template <class Q>
static void map_keys(const Problem& p, const Q* key, const float* weight, int64_t pitch,
                     float* scratch, float* out) {
  float* const rows = scratch + p.places * pitch;
  for (int64_t i = 0; i < p.places; i++) {
    for (int64_t c = 0; c < p.keys; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.keys - c));
      simd::store(scratch + i * pitch + c, simd::get(weight + i * p.keys + c, lanes));
    }
    for (int64_t k = 0; k < p.depth; k++) {
      rows[k * p.places + i] = simd::to_float(key[k * p.key_stride[2] + i * p.key_stride[3]]);
    }
  }
  softmax::each_rows(0, p.depth, [&](auto size, int64_t k) {
    const auto zero = [](int, int64_t) VB_INLINE_LAMBDA { return simd::zero(); };
    const auto store = [&](int r, int64_t c, F sum) VB_INLINE_LAMBDA {
      simd::store(out + (k + r) * pitch + c, sum);
    };
    multiply<size.value>(p.places, rows + k * p.places, scratch, pitch, zero, store);
  });
}

}  // namespace weights
