// The two products of softmax attention, for a tile of queries. Lanes are queries, so that vectors
// are full for any head dim; keys and values are broadcast.
#pragma once
#include <cstdint>
#include "common/dot.h"
#include "common/variants.h"

namespace attention {

using simd::F;
using simd::Floats;
using simd::W;

// Vectors of queries in a tile, and keys or channels with sums in registers. NEON's vectors are
// short, so each broadcast value is multiplied with more of them.
constexpr int VECTORS = VB_NEON ? 4 : 2;
constexpr int TILE = VECTORS * W;
constexpr int SUMS = VB_NEON ? 6 : simd::REGISTERS == 32 ? 12 : 5;

// K keys: scores = terms + keys . query, and the maximum of each lane.
struct ScoreArgs {
  const float* query;  // [step][TILE], in steps of Floats or Pairs
  const float* keys;   // [key][step]
  int steps;
  // The initial values of each vector of queries, LINE floats per line; or null.
  const float* terms[VECTORS];
  const int32_t* lines[VECTORS];  // [key]
  float* scores;                  // [key][TILE]
  float* top;                     // [TILE]
};
constexpr int LINE = 16;
static_assert(LINE % W == 0);

template <class P, int V, int K>
static void score(const ScoreArgs& args) {
  const ScoreArgs a = args;
  F sum[K][V];
  VB_UNROLL
  for (int k = 0; k < K; k++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) {
      sum[k][v] = a.terms[v] ? simd::load(a.terms[v] + a.lines[v][k] * LINE) : simd::zero();
    }
  }
  for (int c = 0; c < a.steps; c++) {
    F q[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) q[v] = simd::in_register(simd::load(a.query + c * TILE + v * W));
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      const F key = simd::set1(a.keys[k * a.steps + c]);
      VB_UNROLL
      for (int v = 0; v < V; v++) P::add_product(sum[k][v], key, q[v]);
    }
  }
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    F top = simd::load(a.top + v * W);
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      top = simd::max(top, sum[k][v]);
      simd::store(a.scores + k * TILE + v * W, sum[k][v]);
    }
    simd::store(a.top + v * W, top);
  }
}

// C channels: sums = sums * factor + weights . values.
struct MixArgs {
  const float* weights;  // [step][TILE], in steps of Floats or Pairs of keys
  const float* values;   // [step][channel], from the first channel of the block
  int steps, value_dim;
  const float* factor;  // [TILE], or null to start from zero
  float* sums;          // [channel][TILE]
};

template <class P, int V, int C>
static void mix(const MixArgs& args) {
  const MixArgs a = args;
  F sum[C][V];
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const F factor = a.factor ? simd::load(a.factor + v * W) : simd::zero();
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      sum[c][v] = a.factor ? simd::load(a.sums + c * TILE + v * W) * factor : simd::zero();
    }
  }
  for (int k = 0; k < a.steps; k++) {
    F p[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) p[v] = simd::in_register(simd::load(a.weights + k * TILE + v * W));
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      const F value = simd::set1(a.values[k * a.value_dim + c]);
      VB_UNROLL
      for (int v = 0; v < V; v++) P::add_product(sum[c][v], value, p[v]);
    }
  }
  VB_UNROLL
  for (int c = 0; c < C; c++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) simd::store(a.sums + c * TILE + v * W, sum[c][v]);
  }
}

// [vectors - 1][keys - 1] and [vectors - 1][channels - 1]. Static, since libraries for different
// instruction sets in one process would otherwise share them.
template <class P>
static constexpr auto SCORE = variants<VECTORS>([](auto v) {
  return variants<SUMS>([](auto k) { return score<P, decltype(v)::value, k.value>; });
});
template <class P>
static constexpr auto MIX = variants<VECTORS>([](auto v) {
  return variants<SUMS>([](auto c) { return mix<P, decltype(v)::value, c.value>; });
});

// Calls work(first, count) for even parts of at most SUMS each.
template <class Work>
static void in_parts(int total, const Work& work) {
  for (int parts = (total + SUMS - 1) / SUMS, first = 0; parts > 0; parts--) {
    const int count = (total - first + parts - 1) / parts;
    work(first, count);
    first += count;
  }
}

}  // namespace attention
