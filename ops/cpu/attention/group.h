// The parameters of attention, and the rows of one head of one group: their addresses, copies of
// keys and values, and the epilogue.
#pragma once
#include "common/kernel.h"
#include "common/dot.h"
#include "common/rotation.h"

namespace attention {

using simd::F;
using simd::Floats;
using simd::round_up;
using simd::W;

// grouped.py fills in these fields.
struct Problem {
  int64_t batch, groups, heads, queries, region_keys, routes, dim, value_dim;
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // image, token, head
  int64_t bias_stride[3], gate_stride[3];
  int64_t width;       // of the map, used for rotations
  int64_t term_lines;  // per head
  double scale;
  int64_t bfloat16, threads;
};

struct Tensors {
  const void *query, *key, *value;
  const int32_t* rows;      // [group][token]; null: one group, `queries` to `region_keys`
  const int32_t* key_rows;  // for keys and values, if they differ; negative: zeros
  const int64_t* regions;   // [image][group][route], for keys and values, or null
  // Rotations of queries and keys, see rotation.h; null for none.
  const float *row_table, *column_table;
  // Terms added to products of queries and keys before scaling, or null: each key has a line of
  // numbers for each LINE queries.
  const float* terms;    // [head][line][LINE]
  const int32_t* lines;  // [kind][block of queries][key]
  const int32_t* kinds;  // [group], or null
  // The output is (attention + bias) * gate; both have its shape, and both or neither are null.
  const void *bias, *gate;
  void* out;
};

constexpr int64_t ROWS_AHEAD = 8;
constexpr float LOG2E = 1.44269504f;

// Copies whole vectors, padded with zeros.
template <class T>
static VB_INLINE void to_floats(const T* in, float* out, int count) {
  for (int c = 0; c < count; c += W) simd::store(out + c, simd::get(in + c, std::min(W, count - c)));
}
template <class T>
static VB_INLINE void from_floats(const float* in, T* out, int count) {
  for (int c = 0; c < count; c += W) simd::put(out + c, simd::load(in + c), std::min(W, count - c));
}

struct Scratch {
  float* keys;    // [key][step], padded by a vector, values by two
  float* values;  // [step][channel]
  float* query;   // [channel][TILE], then [step][TILE]; for few queries [query][step]
  float* rows;    // [W][channel]
  float *scores, *sums;
  // For a few queries.
  float* columns;       // [step][key]
  const float** key;    // [key], addresses of rows, then [step], addresses of columns
  const float** value;  // [step of keys], addresses of channels
};

// One head of one group. P is how values of T are multiplied; rotated ones are Floats.
template <class T, class P>
struct Group {
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

  int keys() const { return static_cast<int>(p.region_keys * p.routes); }

  void rotate(float* row, int64_t token) const {
    rotation::rotate({t.row_table, t.column_table, p.width, static_cast<int>(p.dim)}, row, token,
                     simd::set1(1.f), row);
  }

  // Calls take(token, key) for all keys.
  template <class Take>
  VB_INLINE void each_key(const Take& take) const {
    const int64_t own = group, count = p.region_keys;
    const int64_t* regions = t.regions ? t.regions + (image * p.groups + group) * p.routes : &own;
    int key = 0;
    for (int64_t r = 0; r < p.routes; r++) {
      const int64_t first = regions[r] * count;
      for (int64_t i = first, end = first + count; i < end; i++, key++) {
        if (i + ROWS_AHEAD < end) prefetch_key(key_row(i + ROWS_AHEAD));
        take(key_row(i), key);
      }
    }
  }

  // Prefetches rows too short for the hardware prefetcher.
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
  }

  // Zeros if `in` is null.
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

  // Processes whole vectors.
  void finish(int64_t token, float* out) const {
    const T* bias = row(t.bias, p.bias_stride, token);
    const T* gate = row(t.gate, p.gate_stride, token);
    for (int64_t c = 0; c < p.value_dim; c += W) {
      const F x = simd::load(out + c) + simd::load_as_float(bias + c);
      simd::store(out + c, x * simd::load_as_float(gate + c));
    }
  }

  void give_row(int64_t token, float* floats) const {
    T* out = static_cast<T*>(t.out) + image * p.out_stride[0] + token * p.out_stride[1] +
             head * p.out_stride[2];
    if (t.gate) finish(token, floats);
    from_floats(floats, out, static_cast<int>(p.value_dim));
  }
};

}  // namespace attention
