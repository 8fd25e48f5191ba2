// Softmax attention of a few queries. Lanes are keys, then channels, since most lanes of queries
// would be empty. Keys and values are read in place if possible.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include "attention/group.h"

namespace attention {

constexpr int MAX_QUERIES = W * 3 / 4;  // queries at most
constexpr int64_t MAX_KEYS = 1024;  // at most, so that their columns stay in the cache
constexpr int LANES = 2 * W;  // with sums in registers

// Rows of Q queries, in steps of Floats or Pairs, times columns.
struct QueriesArgs {
  const float* rows;  // [Q][row_pitch]
  ptrdiff_t row_pitch;
  const float* const* columns;  // [step], each readable up to a multiple of LANES
  int steps, lanes;
  float* sums;  // [Q][sum_pitch], a multiple of LANES
  ptrdiff_t sum_pitch;
};

template <class P, int Q>
static void multiply_queries(const QueriesArgs& args) {
  const QueriesArgs a = args;
  for (int lane = 0; lane < a.lanes; lane += LANES) {
    F sum[Q][2] = {};
    for (int i = 0; i < a.steps; i++) {
      const F first = simd::in_register(simd::load(a.columns[i] + lane));
      const F second = simd::in_register(simd::load(a.columns[i] + lane + W));
      VB_UNROLL
      for (int q = 0; q < Q; q++) {
        const F x = simd::in_register(simd::set1(a.rows[q * a.row_pitch + i]));
        P::add_product(sum[q][0], x, first);
        P::add_product(sum[q][1], x, second);
      }
    }
    VB_UNROLL
    for (int q = 0; q < Q; q++) {
      simd::store(a.sums + q * a.sum_pitch + lane, sum[q][0]);
      simd::store(a.sums + q * a.sum_pitch + lane + W, sum[q][1]);
    }
  }
}

using MultiplyQueries = void (*)(const QueriesArgs&);

template <class P, int... I>
static constexpr std::array<MultiplyQueries, MAX_QUERIES> query_kernels(
    std::integer_sequence<int, I...>) {
  return {multiply_queries<P, I + 1>...};
}
// [queries - 1]
template <class P>
static constexpr std::array<MultiplyQueries, MAX_QUERIES> MULTIPLY_QUERIES =
    query_kernels<P>(std::make_integer_sequence<int, MAX_QUERIES>());

static bool are_few(const Problem& p, const Tensors& t) {
  const int64_t keys = p.region_keys * p.routes;
  return p.queries <= MAX_QUERIES && keys >= W && keys <= MAX_KEYS && !t.terms;
}

// A group with few queries.
template <class T, class P>
struct FewQueries : Group<T, P> {
  using Group<T, P>::p;
  using Group<T, P>::t;
  using Group<T, P>::s;
  using Group<T, P>::keys;
  using Group<T, P>::row;
  using Group<T, P>::query_row;

  void run() const {
    const int count = static_cast<int>(p.queries), dim = static_cast<int>(p.dim);
    const int value_dim = static_cast<int>(p.value_dim), steps = simd::steps<P>(dim);
    const ptrdiff_t row_pitch = round_up(dim, W), key_pitch = round_up(keys(), LANES);
    const ptrdiff_t sum_pitch = round_up(value_dim, LANES);
    find_keys(steps);
    keys_to_columns(steps, key_pitch);
    for (int q = 0; q < count; q++) take_row(q, s.query + q * row_pitch);
    const MultiplyQueries multiply = MULTIPLY_QUERIES<P>[count - 1];
    multiply({s.query, row_pitch, s.key, steps, keys(), s.scores, key_pitch});
    float factor[MAX_QUERIES];
    for (int q = 0; q < count; q++) factor[q] = 1.f / weigh_row(s.scores + q * key_pitch);
    const int key_steps = simd::steps<P>(keys());
    multiply({s.scores, key_pitch, s.value, key_steps, value_dim, s.sums, sum_pitch});
    for (int q = 0; q < count; q++) {
      float* sums = s.sums + q * sum_pitch;
      for (int c = 0; c < value_dim; c += W) {
        simd::store(sums + c, simd::load(sums + c) * simd::set1(factor[q]));
      }
      this->give_row(query_row(q), sums);
    }
  }

  void find_keys(int steps) const {
    // Steps fill whole vectors and are read in place; rotated rows are copies.
    const bool steps_lie = sizeof(T) * P::COUNT == sizeof(float) && p.dim % (W * P::COUNT) == 0;
    const bool keys_lie = steps_lie && !t.row_table;
    const bool values_lie = std::is_same_v<T, float> && p.value_dim % LANES == 0;
    this->each_key([&](int64_t token, int key) {
      if (keys_lie && token >= 0) {
        s.key[key] = reinterpret_cast<const float*>(row(t.key, p.key_stride, token));
      } else {
        this->take_key(token, key);
        s.key[key] = s.keys + static_cast<ptrdiff_t>(key) * steps;
      }
      const T* value = token < 0 ? nullptr : row(t.value, p.value_stride, token);
      if (values_lie && value) {
        s.value[key] = reinterpret_cast<const float*>(value);
      } else {
        this->take_value(value, key);
        s.value[key / P::COUNT] = s.values + key / P::COUNT * p.value_dim;
      }
    });
  }

  // Transposes rows of keys into columns, with zeros past the last key.
  void keys_to_columns(int steps, ptrdiff_t pitch) const {
    float* zeros = s.sums;
    std::fill_n(zeros, round_up(steps, W), 0.f);
    for (ptrdiff_t k = keys(); k < pitch; k++) s.key[k] = zeros;
    for (ptrdiff_t k = 0; k < pitch; k += W) {
      for (int i = 0; i < steps; i += W) {
        const float* rows[W];
        for (int l = 0; l < W; l++) rows[l] = s.key[k + l] + i;
        simd::transpose(rows, s.columns + i * pitch + k, pitch, std::min(W, steps - i));
      }
    }
    for (int i = 0; i < steps; i++) s.key[i] = s.columns + i * pitch;
  }

  // Copies a query in steps.
  void take_row(int64_t query, float* out) const {
    const int dim = static_cast<int>(p.dim);
    const int64_t token = query_row(query);
    const F sign = simd::set1(p.scale < 0 ? -1.f : 1.f);
    float* floats = std::is_same_v<P, Floats> ? out : s.rows;
    to_floats(row(t.query, p.query_stride, token), floats, dim);
    if (t.row_table) this->rotate(floats, token);
    for (int c = 0; c < dim; c += W) simd::store(floats + c, simd::load(floats + c) * sign);
    if constexpr (!std::is_same_v<P, Floats>) {
      from_floats(floats, reinterpret_cast<T*>(out), dim + dim % 2);
    }
  }

  // Turns the scores of a query into weights, in steps, in place; returns their sum. Scores past
  // the last key have no weight.
  float weigh_row(float* score) const {
    const int rest = (keys() - 1) % W + 1;
    float* const last = score + keys() - rest;
    float inside[W], tops[W];
    for (int l = 0; l < W; l++) {
      inside[l] = l < rest ? 1.f : 0.f;
      if (l >= rest) last[l] = std::numeric_limits<float>::lowest();
    }
    F most = simd::load(last);
    for (const float* x = score; x < last; x += W) most = simd::max(most, simd::load(x));
    simd::store(tops, most);
    const F top = simd::set1(*std::max_element(tops, tops + W));
    const F scale = simd::set1(std::fabs(static_cast<float>(p.scale)) * LOG2E);
    const F shift = simd::zero() - top * scale;
    F sum = simd::zero();
    for (float* x = score; x <= last; x += W) {
      F weight = simd::exp2(simd::fma(simd::load(x), scale, shift));
      if (x == last) weight = weight * simd::load(inside);  // with a scale of zero they are 1
      sum = sum + weight;
      if constexpr (std::is_same_v<P, Floats>) {
        simd::store(x, weight);
      } else {
        simd::store_from_float(reinterpret_cast<T*>(score) + (x - score), weight);
      }
    }
    return simd::reduce_add(sum);
  }
};

}  // namespace attention
