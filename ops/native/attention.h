// Softmax attention of groups of tokens to groups of tokens, which tables of rows pick from maps
// where they lie, such as windows, or regions that regions choose, without any copy of the maps
// ("FlashAttention", Dao et al. 2022, is the online softmax).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include "attention_products.h"
#include "lanes.h"
#include "parallel.h"
#include "room.h"
#include "rotation.h"

namespace attention {

// ops/inference/grouped_attention.py has the same fields in the same order.
struct Problem {
  int64_t batch, groups, heads, queries, region_keys, routes, dim, value_dim;
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // image, token, head
  int64_t bias_stride[3], gate_stride[3];
  int64_t width;       // of the map, for rotations
  int64_t term_lines;  // of a head
  double scale;
  int64_t bfloat16, threads;
};

struct Tensors {
  const void *query, *key, *value;
  const int32_t* rows;      // [group][token], or null: one group of `queries` sees `region_keys`
  const int32_t* key_rows;  // of keys and values, where they differ; zeros for those below 0
  const int64_t* regions;   // [image][group][route], of keys and values, or null
  // Queries and keys are rotated, see rotation.h, or not where these are null.
  const float *row_table, *column_table;
  // What is added to products of queries and keys before they are scaled, or null: a key has a line
  // of numbers for every LINE queries.
  const float* terms;    // [head][line][LINE]
  const int32_t* lines;  // [kind][block of queries][key]
  const int32_t* kinds;  // [group], or null
  // What attention gives plus the one times the other, like the output; both or neither are null.
  const void *bias, *gate;
  void* out;
};

constexpr int BLOCK = 128;  // keys at a time: scores, keys and values stay near the L1 cache
constexpr int64_t TASK_QUERIES = 512;
constexpr float LOG2E = 1.44269504f;
constexpr int64_t ROWS_AHEAD = 8;

// In whole vectors, with zeros behind.
template <class T>
static VB_INLINE void to_floats(const T* in, float* out, int count) {
  for (int c = 0; c < count; c += W) simd::store(out + c, simd::get(in + c, std::min(W, count - c)));
}
template <class T>
static VB_INLINE void from_floats(const float* in, T* out, int count) {
  for (int c = 0; c < count; c += W) simd::put(out + c, simd::load(in + c), std::min(W, count - c));
}

struct Scratch {
  float* keys;    // [key][step], and room for a vector, as behind the values
  float* values;  // [step][channel]
  float* query;   // [channel][TILE], then [step][TILE]
  float* rows;    // [W][channel]
  float *scores, *sums;
};

// One head of one group. P says how T are multiplied; rotated ones as Floats.
template <class T, class P>
struct Task {
  const Problem& p;
  const Tensors& t;
  int64_t image, group, head;
  Scratch& s;

  const T* row(const void* base, const int64_t (&stride)[3], int64_t token) const {
    return static_cast<const T*>(base) + image * stride[0] + token * stride[1] + head * stride[2];
  }
  int64_t query_row(int64_t i) const {
    const int64_t at = group * p.queries + i;
    return t.rows ? t.rows[at] : at;
  }
  int64_t key_row(int64_t i) const {
    const int32_t* rows = t.key_rows ? t.key_rows : t.rows;
    return rows ? rows[i] : i;
  }

  void rotate(float* row, int64_t token) const {
    rotation::rotate({t.row_table, t.column_table, p.width, static_cast<int>(p.dim)}, row, token,
                     simd::set1(1.f), row);
  }

  void take_keys() const {
    const int64_t own = group, count = p.region_keys;
    const int64_t* regions = t.regions ? t.regions + (image * p.groups + group) * p.routes : &own;
    int key = 0;
    for (int64_t r = 0; r < p.routes; r++) {
      const int64_t first = regions[r] * count;
      for (int64_t i = first, end = first + count; i < end; i++, key++) {
        if (i + ROWS_AHEAD < end) prefetch_key(key_row(i + ROWS_AHEAD));
        take_key(key_row(i), key);
      }
    }
  }

  // Short rows, for which the hardware does not look ahead.
  static VB_INLINE void prefetch(const T* row, int64_t dim) {
    __builtin_prefetch(row);
    __builtin_prefetch(row + dim - 1);
  }
  void prefetch_key(int64_t token) const {
    if (token < 0) return;
    prefetch(row(t.key, p.key_stride, token), p.dim);
    prefetch(row(t.value, p.value_stride, token), p.value_dim);
  }

  void take_key(int64_t token, int key) const {
    const int dim = static_cast<int>(p.dim);
    float* keys = s.keys + static_cast<ptrdiff_t>(key) * simd::steps<P>(dim);
    if (token < 0) {
      std::fill_n(keys, simd::steps<P>(dim), 0.f);
      take_value(nullptr, key);
      return;
    }
    const T* in = row(t.key, p.key_stride, token);
    if constexpr (std::is_same_v<P, Floats>) {
      to_floats(in, keys, dim);
      if (t.row_table) rotate(keys, token);
    } else {
      T* out = reinterpret_cast<T*>(keys);
      simd::copy(in, dim, out);
      if (dim % 2) simd::assign(out + dim, 0.f);
    }
    take_value(row(t.value, p.value_stride, token), key);
  }

  // Zeros where `in` is null.
  void take_value(const T* in, int key) const {
    const int dim = static_cast<int>(p.value_dim);
    float* out = s.values + static_cast<ptrdiff_t>(key / P::COUNT) * dim;
    if constexpr (std::is_same_v<P, Floats>) {
      if (in) {
        to_floats(in, out, dim);
      } else {
        std::fill_n(out, dim, 0.f);
      }
    } else {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
      if (key % 2 == 0) {
        for (int c = 0; c < dim; c++) pairs[c] = in ? in[c].bits : 0;
      } else if (in) {
        for (int c = 0; c < dim; c++) pairs[c] |= static_cast<uint32_t>(in[c].bits) << 16;
      }
    }
  }

  // Queries as columns; lanes without a query repeat the last one.
  void take_queries(int64_t first, int count) const {
    const int dim = static_cast<int>(p.dim), pitch = (dim + W - 1) / W * W;
    const F sign = simd::set1(p.scale < 0 ? -1.f : 1.f);
    for (int v = 0; v * W < count; v++) {
      for (int l = 0; l < W; l++) {
        const int64_t soon = first + v * W + l + TILE;
        if (soon < p.queries) prefetch(row(t.query, p.query_stride, query_row(soon)), p.dim);
        const int64_t token = query_row(first + std::min(v * W + l, count - 1));
        float* floats = s.rows + l * pitch;
        to_floats(row(t.query, p.query_stride, token), floats, dim);
        if (t.row_table) rotate(floats, token);
      }
      for (int c = 0; c < pitch; c += W) {
        float* out = s.query + c * TILE + v * W;
        simd::transpose(s.rows + c, pitch, out, TILE, W);
        for (int i = 0; i < W; i++) simd::store(out + i * TILE, simd::load(out + i * TILE) * sign);
      }
      pack_steps(s.query + v * W, simd::steps<P>(dim));
    }
  }

  // [number][TILE] -> [step][TILE], of one vector.
  static void pack_steps(float* columns, int count) {
    if constexpr (!std::is_same_v<P, Floats>) {
      for (int i = 0; i < count; i++) {
        const float* two = columns + 2 * i * TILE;
        simd::store(columns + i * TILE, P::pack(simd::load(two), simd::load(two + TILE)));
      }
    }
  }

  // In whole vectors.
  void finish(int64_t token, float* out) const {
    const T* bias = row(t.bias, p.bias_stride, token);
    const T* gate = row(t.gate, p.gate_stride, token);
    for (int64_t c = 0; c < p.value_dim; c += W) {
      const F x = simd::load(out + c) + simd::load_as_float(bias + c);
      simd::store(out + c, x * simd::load_as_float(gate + c));
    }
  }

  void give(int64_t first, int count, const float* total) const {
    const int dim = static_cast<int>(p.value_dim), pitch = (dim + W - 1) / W * W;
    for (int v = 0; v * W < count; v++) {
      const F factor = simd::set1(1.f) / simd::load(total + v * W);
      for (int c = 0; c < dim; c++) {
        float* sum = s.sums + c * TILE + v * W;
        simd::store(sum, simd::load(sum) * factor);
      }
      for (int c = 0; c < pitch; c += W) {
        simd::transpose(s.sums + c * TILE + v * W, TILE, s.rows + c, pitch, W);
      }
      for (int l = 0; l < W && v * W + l < count; l++) {
        const int64_t token = query_row(first + v * W + l);
        T* out = static_cast<T*>(t.out) + image * p.out_stride[0] + token * p.out_stride[1] +
                 head * p.out_stride[2];
        if (t.gate) finish(token, s.rows + l * pitch);
        from_floats(s.rows + l * pitch, out, dim);
      }
    }
  }

  // A vector's scores of a block -> weights, in the same place; returns their sums.
  F weigh(float* score, int keys, F scale, F top) const {
    const F shift = simd::zero() - top * scale;
    F sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
    float* out = score;
    const auto take = [&](int i) VB_INLINE_LAMBDA {
      const F x = simd::exp2(simd::fma(simd::load(score), scale, shift));
      score += TILE;
      sums[i] = sums[i] + x;
      return x;
    };
    const auto put = [&](F x) VB_INLINE_LAMBDA {
      simd::store(out, x);
      out += TILE;
    };
    int k = 0;
    if constexpr (std::is_same_v<P, Floats>) {
      for (; k + 4 <= keys; k += 4) {
        VB_UNROLL
        for (int i = 0; i < 4; i++) put(take(i));
      }
      for (; k < keys; k++) put(take(0));
    } else {
      for (; k + 4 <= keys; k += 4) {
        VB_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const F x = take(i), y = take(i + 1);
          put(P::pack(x, y));
        }
      }
      for (; k < keys; k += 2) {
        const F x = take(0), y = k + 1 < keys ? take(1) : simd::zero();
        put(P::pack(x, y));
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void attend(int64_t first, int count) const {
    const int vectors = (count + W - 1) / W, keys = static_cast<int>(p.region_keys * p.routes);
    const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
    const F scale = simd::set1(std::fabs(static_cast<float>(p.scale)) * LOG2E);
    const float lowest = std::numeric_limits<float>::lowest();
    float top[TILE], total[TILE] = {}, factor[TILE];
    std::fill_n(top, TILE, lowest);
    ScoreArgs score{s.query, nullptr, simd::steps<P>(dim), {}, {}, nullptr, top};
    const int32_t* lines[VECTORS] = {};
    for (int v = 0; t.terms && v < vectors; v++) {
      const int64_t query = first + v * W, blocks = (p.queries + LINE - 1) / LINE;
      score.terms[v] = t.terms + head * p.term_lines * LINE + query % LINE;
      lines[v] = t.lines + ((t.kinds ? t.kinds[group] : 0) * blocks + query / LINE) * keys;
    }
    for (int begin = 0; begin < keys; begin += BLOCK) {
      const int block = std::min(BLOCK, keys - begin);
      float before[TILE];
      std::copy_n(top, TILE, before);
      in_parts(block, [&](int k, int part) {
        score.keys = s.keys + (begin + k) * score.steps;
        score.scores = s.scores + k * TILE;
        for (int v = 0; t.terms && v < vectors; v++) score.lines[v] = lines[v] + begin + k;
        SCORE<P>[vectors - 1][part - 1](score);
      });
      for (int v = 0; v < vectors; v++) {
        const F now = simd::load(top + v * W);
        const F sum = weigh(s.scores + v * W, block, scale, now);
        const F f = simd::exp2((simd::load(before + v * W) - now) * scale);
        simd::store(factor + v * W, f);
        simd::store(total + v * W, simd::fma(simd::load(total + v * W), f, sum));
      }
      const float* values = s.values + begin / P::COUNT * value_dim;
      in_parts(value_dim, [&](int c, int part) {
        MIX<P>[vectors - 1][part - 1]({s.scores, values + c, simd::steps<P>(block), value_dim,
                                       begin ? factor : nullptr, s.sums + c * TILE});
      });
    }
    give(first, count, total);
  }
};

template <class T, class P>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t chunks = (p.queries + TASK_QUERIES - 1) / TASK_QUERIES;
  const int64_t tasks = p.batch * p.heads * p.groups * chunks;
  const auto padded = [](int64_t dim) { return (dim + W - 1) / W * W; };
  const auto work = [&](int64_t index) {
    static thread_local Room<float> rooms[6];
    const int64_t keys = p.region_keys * p.routes;
    Scratch s{rooms[0].of(keys * p.dim + W),
              rooms[1].of((keys + 1) * p.value_dim + W),
              rooms[2].of(padded(p.dim) * TILE),
              rooms[3].of(W * std::max(padded(p.dim), padded(p.value_dim))),
              rooms[4].of(BLOCK * TILE),
              rooms[5].of(padded(p.value_dim) * TILE)};
    // Heads of the same tokens follow each other: they are neighbours in memory.
    const int64_t chunk = index % chunks, head = index / chunks % p.heads;
    const int64_t group = index / (chunks * p.heads) % p.groups;
    const Task<T, P> task{p, t, index / (chunks * p.groups * p.heads), group, head, s};
    task.take_keys();
    const int64_t end = std::min(p.queries, (chunk + 1) * TASK_QUERIES);
    for (int64_t i = chunk * TASK_QUERIES; i < end; i += TILE) {
      const int count = static_cast<int>(std::min<int64_t>(TILE, end - i));
      task.take_queries(i, count);
      task.attend(i, count);
    }
  };
  parallel::for_each(tasks, p.threads, work);
}

}  // namespace attention
