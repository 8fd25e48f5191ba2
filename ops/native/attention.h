// Softmax attention of groups of tokens to groups of tokens, which a table of rows picks from maps
// where they lie, such as regions that regions choose, without any copy of the maps
// ("FlashAttention", Dao et al. 2022, is the online softmax). A lane is a query, so that every head
// dim fills the vectors; keys and values are broadcast.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include "parallel.h"
#include "room.h"
#include "rotation.h"
#include "simd.h"

namespace attention {

using simd::F;
using simd::W;

// ops/inference/grouped_attention.py has the same fields in the same order.
struct Problem {
  int64_t batch, groups, heads, queries, region_keys, routes, dim, value_dim;
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // image, token, head
  int64_t bias_stride[3], gate_stride[3];
  int64_t width;  // of the map, for rotations
  double scale;
  int64_t bfloat16, threads;
};

struct Tensors {
  const void *query, *key, *value;
  const int32_t* rows;     // [group][token], or null: one group of `queries` sees `region_keys`
  const int64_t* regions;  // [image][group][route], of keys and values, or null
  // Queries and keys are rotated, see rotation.h, or not where these are null.
  const float *row_table, *column_table;
  // What attention gives plus the one times the other, like the output; both or neither are null.
  const void *bias, *gate;
  void* out;
};

constexpr int VECTORS = 2;           // of queries in a tile
constexpr int TILE = VECTORS * W;
constexpr int BLOCK = 128;           // keys at a time: scores, keys and values stay in the L1 cache
constexpr int SUMS = simd::REGISTERS == 32 ? 12 : 5;  // keys or channels whose sums are in registers
constexpr int64_t TASK_QUERIES = 512;
constexpr float LOG2E = 1.44269504f;

// ---- microkernels ------------------------------------------------------------------------------
// K keys: scores = keys . query, and the greatest of each lane.
struct ScoreArgs {
  const float* query;  // [channel][TILE]
  const float* keys;   // [key][channel]
  int dim;
  float* scores;  // [key][TILE]
  float* top;     // [TILE]
};

template <int V, int K>
static void score(const ScoreArgs& args) {
  const ScoreArgs a = args;
  F sum[K][V];
  VB_UNROLL
  for (int k = 0; k < K; k++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) sum[k][v] = simd::zero();
  }
  for (int c = 0; c < a.dim; c++) {
    F q[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) q[v] = simd::in_register(simd::load(a.query + c * TILE + v * W));
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      const F key = simd::set1(a.keys[k * a.dim + c]);
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[k][v] = simd::fma(key, q[v], sum[k][v]);
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
  const float* weights;  // [key][TILE]
  const float* values;   // [key][channel], at the first of the channels
  int keys, value_dim;
  const float* factor;  // [TILE], or null to start from zero
  float* sums;          // [channel][TILE]
};

template <int V, int C>
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
  for (int k = 0; k < a.keys; k++) {
    F p[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) p[v] = simd::in_register(simd::load(a.weights + k * TILE + v * W));
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      const F value = simd::set1(a.values[k * a.value_dim + c]);
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[c][v] = simd::fma(value, p[v], sum[c][v]);
    }
  }
  VB_UNROLL
  for (int c = 0; c < C; c++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) simd::store(a.sums + c * TILE + v * W, sum[c][v]);
  }
}

using Score = void (*)(const ScoreArgs&);
using Mix = void (*)(const MixArgs&);

template <int V, int... I>
static constexpr std::array<Score, SUMS> score_kernels(std::integer_sequence<int, I...>) {
  return {score<V, I + 1>...};
}
template <int V, int... I>
static constexpr std::array<Mix, SUMS> mix_kernels(std::integer_sequence<int, I...>) {
  return {mix<V, I + 1>...};
}
constexpr auto UP_TO_SUMS = std::make_integer_sequence<int, SUMS>();
// [vectors - 1][keys - 1] and [vectors - 1][channels - 1]
static constexpr std::array<std::array<Score, SUMS>, VECTORS> SCORE = {score_kernels<1>(UP_TO_SUMS),
                                                                       score_kernels<2>(UP_TO_SUMS)};
static constexpr std::array<std::array<Mix, SUMS>, VECTORS> MIX = {mix_kernels<1>(UP_TO_SUMS),
                                                                   mix_kernels<2>(UP_TO_SUMS)};

// Calls work(first, count) for even parts of at most SUMS.
template <class Work>
static void in_parts(int total, const Work& work) {
  for (int parts = (total + SUMS - 1) / SUMS, first = 0; parts > 0; parts--) {
    const int count = (total - first + parts - 1) / parts;
    work(first, count);
    first += count;
  }
}

// ---- rows --------------------------------------------------------------------------------------
static void to_floats(const float* in, float* out, int count) { std::copy_n(in, count, out); }
static void to_floats(const BFloat16* in, float* out, int count) {
  int c = 0;
  for (; c + W <= count; c += W) simd::store(out + c, simd::load_bf16(in + c));
  for (; c < count; c++) out[c] = simd::to_float(in[c]);
}

template <class T>
static void from_floats(const float* in, T* out, int count) {
  int c = 0;
  for (; c + W <= count; c += W) simd::store_from_float(out + c, simd::load(in + c));
  for (; c < count; c++) simd::assign(out + c, in[c]);
}

struct Scratch {
  float *keys, *values, *query, *rows, *scores, *sums;
};

// One head of one group.
template <class T>
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

  void rotate(float* row, int64_t token) const {
    if (!t.row_table) return;
    rotation::rotate({t.row_table, t.column_table, p.width, static_cast<int>(p.dim)}, row, token,
                     simd::set1(1.f), row);
  }

  void take_keys() const {
    const int64_t own = group, count = p.region_keys;
    const int64_t* regions = t.regions ? t.regions + (image * p.groups + group) * p.routes : &own;
    float *key = s.keys, *value = s.values;
    for (int64_t r = 0; r < p.routes; r++) {
      for (int64_t i = regions[r] * count, end = i + count; i < end; i++) {
        const int64_t token = t.rows ? t.rows[i] : i;
        to_floats(row(t.key, p.key_stride, token), key, static_cast<int>(p.dim));
        rotate(key, token);
        to_floats(row(t.value, p.value_stride, token), value, static_cast<int>(p.value_dim));
        key += p.dim;
        value += p.value_dim;
      }
    }
  }

  // Queries as columns; lanes without a query repeat the last one.
  void take_queries(int64_t first, int count) const {
    const int dim = static_cast<int>(p.dim), pitch = (dim + W - 1) / W * W;
    const F scale = simd::set1(static_cast<float>(p.scale) * LOG2E);
    for (int v = 0; v * W < count; v++) {
      for (int l = 0; l < W; l++) {
        const int64_t token = query_row(first + std::min(v * W + l, count - 1));
        to_floats(row(t.query, p.query_stride, token), s.rows + l * pitch, dim);
        rotate(s.rows + l * pitch, token);
      }
      for (int c = 0; c < pitch; c += W) {
        float* out = s.query + c * TILE + v * W;
        simd::transpose(s.rows + c, pitch, out, TILE, W);
        for (int i = 0; i < W; i++) simd::store(out + i * TILE, simd::load(out + i * TILE) * scale);
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

  void attend(int64_t first, int count) const {
    const int vectors = (count + W - 1) / W, keys = static_cast<int>(p.region_keys * p.routes);
    const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
    float top[TILE], total[TILE] = {}, factor[TILE];
    std::fill_n(top, TILE, -INFINITY);
    for (int begin = 0; begin < keys; begin += BLOCK) {
      const int block = std::min(BLOCK, keys - begin);
      float before[TILE];
      std::copy_n(top, TILE, before);
      in_parts(block, [&](int k, int part) {
        SCORE[vectors - 1][part - 1]({s.query, s.keys + (begin + k) * dim, dim,
                                      s.scores + k * TILE, top});
      });
      for (int v = 0; v < vectors; v++) {
        const F now = simd::load(top + v * W);
        F sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
        float* score = s.scores + v * W;
        int k = 0;
        for (; k + 4 <= block; k += 4) {
          VB_UNROLL
          for (int i = 0; i < 4; i++, score += TILE) {
            const F x = simd::exp2(simd::load(score) - now);
            simd::store(score, x);
            sums[i] = sums[i] + x;
          }
        }
        for (; k < block; k++, score += TILE) {
          const F x = simd::exp2(simd::load(score) - now);
          simd::store(score, x);
          sums[0] = sums[0] + x;
        }
        const F f = simd::exp2(simd::load(before + v * W) - now);
        const F sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        simd::store(factor + v * W, f);
        simd::store(total + v * W, simd::fma(simd::load(total + v * W), f, sum));
      }
      in_parts(value_dim, [&](int c, int part) {
        MIX[vectors - 1][part - 1]({s.scores, s.values + begin * value_dim + c, block,
                                    value_dim, begin ? factor : nullptr, s.sums + c * TILE});
      });
    }
    give(first, count, total);
  }
};

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t chunks = (p.queries + TASK_QUERIES - 1) / TASK_QUERIES;
  const int64_t tasks = p.batch * p.heads * p.groups * chunks;
  const auto padded = [](int64_t dim) { return (dim + W - 1) / W * W; };
  const auto work = [&](int64_t index) {
    static thread_local Room<float> rooms[6];
    const int64_t keys = p.region_keys * p.routes;
    Scratch s{rooms[0].of(keys * p.dim),
              rooms[1].of(keys * p.value_dim),
              rooms[2].of(padded(p.dim) * TILE),
              rooms[3].of(W * std::max(padded(p.dim), padded(p.value_dim))),
              rooms[4].of(BLOCK * TILE),
              rooms[5].of(padded(p.value_dim) * TILE)};
    const int64_t chunk = index % chunks, group = index / chunks % p.groups;
    const int64_t head = index / (chunks * p.groups) % p.heads;
    const Task<T> task{p, t, index / (chunks * p.groups * p.heads), group, head, s};
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
