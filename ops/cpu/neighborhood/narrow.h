// Weighted sums of keys (or values) a vector of channels at a time, which is fast if that holds them
// all. Weights are read where they are, one key or pair of keys at a time, and need not be transposed
// into lanes.
#pragma once
#include "neighborhood/problem.h"

namespace na {

// Queries whose sums are in registers at the same time, with the same window along the last axis
// or with different ones; enough of them to hide the latency of additions.
constexpr int TOGETHER = 8, APART = 4;

// The keys of some queries along the first two axes and along the last one.
struct NarrowWindow {
  const float* keys;      // of the first plane, row and column
  size_t plane, row;      // between keys
  int planes, rows, columns;
  int64_t plane_weights, row_weights;
};

// The weights of a row of queries, `stride` apart, and what their sums are multiplied by, or null.
// The former are followed by numbers other than NaN and infinity unless the latter are null.
template <class T>
struct RowWeights {
  const T* weights;
  int64_t stride;
  const float* factors;
};

// The weight of a key, or of a pair of keys, in all lanes.
template <class P, class T>
static VB_INLINE F spread(const T* weight) {
  if constexpr (P::COUNT == 1) {
    return simd::set1(simd::to_float(*weight));
  } else {
    float pair;
    std::memcpy(&pair, weight, sizeof pair);
    return simd::set1(pair);
  }
}

// The weight of a key and a zero.
template <class T>
static VB_INLINE F spread_last(const T* weight) {
  uint32_t pair = 0;
  std::memcpy(&pair, weight, sizeof *weight);
  float value;
  std::memcpy(&value, &pair, sizeof value);
  return simd::set1(value);
}

// The sums of R queries, whose windows begin at columns `first`, all the same if SAME.
template <class P, int R, bool SAME, class T>
static void mix_narrow(const NarrowWindow& window, const int* first, const T* const* weights,
                       const float* factors, int channels, T* const* out) {
  F sum[R];
  const T* weight[R];
  ptrdiff_t place[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    sum[r] = simd::zero();
    weight[r] = weights[r];
    place[r] = static_cast<ptrdiff_t>(first[r]) * W;
  }
  const int whole = window.columns / P::COUNT * P::COUNT;
  for (int z = 0; z < window.planes; z++) {
    for (int y = 0; y < window.rows; y++) {
      const float* keys = window.keys + z * window.plane + y * window.row;
      const int64_t at = z * window.plane_weights + y * window.row_weights;
      F key = simd::zero();
      const auto load = [&](int r, int k) VB_INLINE_LAMBDA {
        if (!SAME || r == 0) key = simd::load(keys + place[r] + k * W);
      };
      for (int k = 0; k < whole; k += P::COUNT) {
        VB_UNROLL
        for (int r = 0; r < R; r++) {
          load(r, k);
          P::add_product(sum[r], spread<P>(weight[r] + at + k), key);
        }
      }
      if constexpr (P::COUNT == 2) {
        if (whole == window.columns) continue;
        VB_UNROLL
        for (int r = 0; r < R; r++) {
          load(r, whole);
          const T* const last = weight[r] + at + whole;
          P::add_product(sum[r], factors ? spread<P>(last) : spread_last(last),
                         P::without_second(key));
        }
      }
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    simd::put(out[r], factors ? sum[r] * simd::set1(factors[r]) : sum[r], channels);
  }
}

// Sums of `key` in `query`, of the queries in rows [first, end), with the weights row_of(z, y), which
// is called in order.
template <class T, class Row>
static void mix_narrow_rows(const Problem& p, const Layout& l, const Tensor& query,
                            const Tensor& key, int b, int h, int first, int end,
                            const Row& row_of) {
  using P = simd::Products<T>;
  static thread_local Buffer buffer;
  const int low = l.y.start[first], rows = l.y.end(end - 1) - low;
  const int dim = static_cast<int>(p.dim), pitch = round_up(dim, W);
  const auto row = static_cast<size_t>(l.x.size) * W, plane = rows * row;
  const size_t of_vector = l.z.size * plane;
  float* const keys = buffer.get(pitch / W * of_vector);
  const auto line = [&](const Tensor& t, int z, int y) {
    return static_cast<T*>(t.data) + t.at(b, l.z.order[z], l.y.order[y], h);
  };
  for (int c = 0; c < dim; c += W) {
    for (int z = 0; z < l.z.size; z++) {
      for (int y = 0; y < rows; y++) {
        pack_rows<P>(static_cast<const T*>(line(key, z, low + y)) + c, key.x, l.x.order.data(),
                     l.x.size, std::min(W, dim - c), 1.f, keys + c / W * of_vector + z * plane + y * row);
      }
    }
  }
  const int* const start = l.x.start.data();
  // One vector of channels of a row of queries.
  const auto mix = [&](NarrowWindow window, const RowWeights<T>& from, int channels, T* to) {
    for (int x = 0; x < l.x.size;) {
      window.columns = l.x.count[x];
      const T* weight[TOGETHER];
      T* out[TOGETHER];
      int count = 0, same = 0;
      while (count < TOGETHER && x + count < l.x.size && l.x.count[x + count] == window.columns) {
        weight[count] = from.weights + l.x.order[x + count] * from.stride;
        out[count] = to + l.x.order[x + count] * query.x;
        same += same == count && start[x + count] == start[x];
        count++;
      }
      const float* const factors = from.factors ? from.factors + x : nullptr;
      if (same >= APART || same == count) {
        with_constant<TOGETHER>(same, [&](auto r) {
          mix_narrow<P, r.value, true>(window, start + x, weight, factors, channels, out);
        });
        x += same;
      } else {
        count = std::min(count, APART);
        with_constant<APART>(count, [&](auto r) {
          mix_narrow<P, r.value, false>(window, start + x, weight, factors, channels, out);
        });
        x += count;
      }
    }
  };
  for (int z = 0; z < l.z.size; z++) {
    for (int y = first; y < end; y++) {
      NarrowWindow window{keys + l.z.start[z] * plane + (l.y.start[y] - low) * row, plane, row,
                          l.z.count[z], l.y.count[y], 0, p.kernel[1] * p.kernel[2], p.kernel[2]};
      const RowWeights<T> from = row_of(z, y);
      T* const to = line(query, z, y);
      for (int c = 0; c < dim; c += W, window.keys += of_vector) {
        mix(window, from, std::min(W, dim - c), to + c);
      }
    }
  }
}

static bool is_narrow(const Problem& p) { return p.dim <= W; }

// Calls body(layout, image, head, first, end) for bands of rows of queries.
template <class Body>
static void for_each_band(const Problem& p, const Body& body) {
  const Layout layout(p, false);
  // Rows of queries that need not pack many more rows of keys.
  const int64_t height = layout.y.size, band = std::max<int64_t>(16, 2 * p.kernel[1]);
  const int64_t bands = (height + band - 1) / band;
  parallel::for_each_in_turn(p.batch * p.heads * bands, Layout::threads(p), [&](int64_t index) {
    const int64_t at = index % bands, of_heads = index / bands;
    body(layout, static_cast<int>(of_heads / p.heads), static_cast<int>(of_heads % p.heads),
         static_cast<int>(height * at / bands), static_cast<int>(height * (at + 1) / bands));
  });
}

template <class T>
static void mix_narrow(const Problem& p, const Tensor& query, const Tensor& key,
                       const Tensor& weights) {
  for_each_band(p, [&](const Layout& l, int b, int h, int first, int end) {
    const auto row_of = [&](int z, int y) {
      const int64_t begin = weights.at(b, l.z.order[z], l.y.order[y], h);
      return RowWeights<T>{static_cast<const T*>(weights.data) + begin, weights.x, nullptr};
    };
    mix_narrow_rows<T>(p, l, query, key, b, h, first, end, row_of);
  });
}

}  // namespace na
