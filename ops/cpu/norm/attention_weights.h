// Weights of attention: softmax over products of queries and keys, to which a table is added first.
// The keys are linear maps of others. Neither they nor the products are ever stored.
#pragma once
#include "common/dot.h"
#include "norm/softmax.h"

namespace weights {

using simd::F;
using simd::W;

// attention_weights.py fills in these fields. Channels of queries are dense; strides are those of
// images, heads, and queries, or channels and places.
struct Problem {
  int64_t batch, heads, queries, depth, places, keys;
  int64_t query_stride[3], key_stride[4];
  int64_t half_input, half_bias, half;  // which of query and key, table and result are in bfloat16
  int64_t threads;
};

// `weight` is [places][keys], `bias` [heads][queries][keys], `out` has images before that.
struct Tensors {
  const void *query, *key;
  const float* weight;
  const void* bias;
  void* out;
};

constexpr int64_t QUERIES = 64;  // of a task at least, which maps the keys of its head
constexpr int VECTORS = 4;       // of keys at a time

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

template <class Q, class B, class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t heads = p.batch * p.heads, pitch = simd::round_up(p.keys, W);
  const int64_t most = (p.queries + QUERIES - 1) / QUERIES;
  const int64_t parts = std::clamp<int64_t>((p.threads + heads - 1) / heads, 1, most);
  const int64_t of_query = simd::round_up(p.depth, W), of_map = p.places * (pitch + p.depth);
  const int rest = static_cast<int>((p.keys - 1) % W + 1);
  const F end = softmax::end_of(p.keys);
  parallel::for_each(heads * parts, p.threads, [&](int64_t index) {
    static thread_local ScratchBuffer<float> buffer;
    float* const mapped = buffer.of(p.depth * pitch + softmax::ROWS * (pitch + of_query) + of_map);
    float* const logits = mapped + p.depth * pitch;
    float* const rows = logits + softmax::ROWS * pitch;
    const int64_t head = index / parts % p.heads, image = index / parts / p.heads;
    map_keys(p, static_cast<const Q*>(t.key) + image * p.key_stride[0] + head * p.key_stride[1],
             t.weight, pitch, rows + softmax::ROWS * of_query, mapped);
    const Q* const query = static_cast<const Q*>(t.query) + image * p.query_stride[0] +
                           head * p.query_stride[1];
    const B* const table = static_cast<const B*>(t.bias) + head * p.queries * p.keys;
    T* const out = static_cast<T*>(t.out) + (image * p.heads + head) * p.queries * p.keys;
    const int64_t part = index % parts;
    const int64_t begin = p.queries * part / parts, after = p.queries * (part + 1) / parts;
    softmax::each_rows(begin, after, [&](auto size, int64_t i) {
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
      F most[R];
      for (int r = 0; r < R; r++) most[r] = simd::set1(-std::numeric_limits<float>::infinity());
      const auto from_table = [&](int r, int64_t c) VB_INLINE_LAMBDA {
        if (c + W < pitch) return simd::load_as_float(bias[r] + c);
        return simd::get(bias[r] + c, rest) + end;
      };
      const auto keep = [&](int r, int64_t c, F sum) VB_INLINE_LAMBDA {
        simd::store(logits + r * pitch + c, sum);
        most[r] = simd::max(most[r], sum);
      };
      multiply<R>(p.depth, rows, mapped, pitch, from_table, keep);
      softmax::of_rows(p.keys, logits, most, out + i * p.keys);
    });
  });
}

}  // namespace weights
