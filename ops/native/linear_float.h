// Linear layers of floats. The outputs are cut into panels of one or two vectors. The weights of a
// panel lie together, and for some rows at a time its sums stay in registers.
//
// With few rows the time goes into fetching the weights, which a network reads once per image.
// While some panels are worked on, the next ones are therefore fetched ahead.
#pragma once
#include <utility>
#include "linear_problem.h"

namespace linear {

// Two vectors of sums a row, two of weights, one input.
constexpr int MAX_ROWS = (simd::REGISTERS - 3) / 2;
constexpr int STEP = 4;  // products between two fetches
// Of a group of panels that stays in the second-level cache while the rows of a block, which all of
// them are multiplied with, stay in the first-level one. With few blocks a group is one panel.
constexpr int64_t GROUP_BYTES = 512 * 1024, MIN_BLOCKS = 16;

// What rows that are copied are padded to.
static int64_t padded_inputs(const float*, int64_t in_features) { return in_features; }
static bool takes_rows_in_place(const float*, int64_t, int64_t) { return true; }

static int64_t packed_size(const float*, int64_t out_features, int64_t in_features) {
  return padded(out_features) * in_features;
}

// [out_features][in_features] → [panels][in_features][vectors of the panel], zeros at the end.
// A last panel that needs one vector only has one.
static void pack(const float* weight, int64_t out_features, int64_t in_features, float* out) {
  for (int64_t n = 0; n < out_features; n += PANEL) {
    const int64_t width = std::min<int64_t>(PANEL, padded(out_features) - n);
    for (int64_t k = 0; k < in_features; k++, out += width) {
      for (int64_t j = 0; j < width; j++) {
        out[j] = n + j < out_features ? weight[(n + j) * in_features + k] : 0.f;
      }
    }
  }
}

// sum += x * w, in the register that holds the sum: left to choose among the forms of the
// instruction, compilers move sums around, some of them through memory.
static VB_INLINE void add_product(F& sum, F x, F w) {
#if VB_AVX512 || VB_AVX2
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#else
  sum = simd::fma(x, w, sum);
#endif
}

template <int R, int V>
static VB_INLINE void start(const Block<float>& block, F (&sum)[R][V]) {
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const F bias = simd::get(block.bias + v * W, v == V - 1 ? block.lanes : W);
    VB_UNROLL
    for (int r = 0; r < R; r++) sum[r][v] = bias;
  }
}

// Adds the products of `count` inputs of each row, the first of which begins at `first`, with their
// weights; returns where the weights end. `fetch` is called before every `S` of them.
template <int S, int R, int V, class Fetch>
static VB_INLINE const float* add_products(const float* first, ptrdiff_t stride, int64_t count,
                                           const float* weight, const Fetch& fetch,
                                           F (&sum)[R][V]) {
  // Every third row has a pointer; the others lie one or two strides further on, which is part of
  // an address. So many rows have no registers for a pointer each.
  constexpr int POINTERS = (R + 2) / 3;
  const float* in[POINTERS];
  VB_UNROLL
  for (int r = 0; r < POINTERS; r++) in[r] = first + 3 * r * stride;
  const auto products = [&](auto steps) VB_INLINE_LAMBDA {
    constexpr int COUNT = decltype(steps)::value;
    VB_UNROLL
    for (int i = 0; i < COUNT; i++, weight += V * W) {
      F w[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) w[v] = simd::in_register(simd::load(weight + v * W));
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        const F x = simd::in_register(simd::set1(in[r / 3][r % 3 * stride + i]));
        VB_UNROLL
        for (int v = 0; v < V; v++) add_product(sum[r][v], x, w[v]);
      }
    }
    VB_UNROLL
    for (int r = 0; r < POINTERS; r++) {
      in[r] += COUNT;
      __asm__("" : "+r"(in[r]));
    }
    __asm__("" : "+r"(stride));
  };
  int64_t k = 0;
  for (; k + S <= count; k += S) {
    fetch();
    products(std::integral_constant<int, S>());
  }
  for (; k < count; k++) products(std::integral_constant<int, 1>());
  return weight;
}

template <int R, int V>
static void run(const Problem& p, const Rows<float>& rows, const Block<float>& block,
                Ahead& ahead) {
  F sum[R][V];
  start(block, sum);
  Ahead fetched = ahead;
  const auto fetch = [&]() VB_INLINE_LAMBDA { fetched.fetch(); };
  add_products<STEP>(block.in, rows.in_stride, rows.in_features, block.weight, fetch, sum);
  ahead = fetched;
  finish<float, R, V>(p, block, sum);
}

using Run = void (*)(const Problem&, const Rows<float>&, const Block<float>&, Ahead&);

template <int V, size_t... I>
static Run run_of(int64_t rows, std::index_sequence<I...>) {
  static constexpr Run runs[] = {run<I + 1, V>...};
  return runs[rows - 1];
}

static Run run_of(int64_t rows, bool wide) {
  constexpr std::make_index_sequence<MAX_ROWS> variants;
  return wide ? run_of<2>(rows, variants) : run_of<1>(rows, variants);
}

static void run_panels(const Problem& p, const Tensors& t, const Rows<float>& rows,
                       Range panels) {
  const int64_t blocks = (rows.count + MAX_ROWS - 1) / MAX_ROWS, k = rows.in_features;
  const float* const weights = static_cast<const float*>(t.weight);
  const auto begin_of = [&](int64_t panel) {
    return weights + std::min(panel * PANEL, padded(p.out_features)) * k;
  };
  const int64_t fitting = std::max<int64_t>(1, GROUP_BYTES / (PANEL * k * int64_t{sizeof(float)}));
  // Each group is twice the one before, lest nothing be fetched ahead of a large first one.
  Range group{panels.begin, panels.begin + 1};
  while (group.begin < panels.end) {
    const int64_t count = group.end - group.begin;
    const int64_t next =
        std::min({blocks < MIN_BLOCKS ? 1 : 2 * count, fitting, panels.end - group.end});
    Ahead ahead(begin_of(group.end),
                (begin_of(group.end + next) - begin_of(group.end)) * int64_t{sizeof(float)},
                std::max<int64_t>(1, count * blocks * (k / STEP)));
    for (int64_t i = 0; i < blocks; i++) {
      const Range range = share(rows.count, i, blocks);
      for (int64_t panel = group.begin; panel < group.end; panel++) {
        const int64_t n = panel * PANEL, left = p.out_features - n;
        const bool wide = left > W;
        Block<float> block{rows.in + range.begin * rows.in_stride, begin_of(panel), t.bias + n,
                           nullptr, rows.out + range.begin * p.out_stride + n,
                           rows.energy ? rows.energy + n : nullptr,
                           static_cast<int>(std::min<int64_t>(W, wide ? left - W : left))};
        if (rows.other) block.other = rows.other + range.begin * p.other_stride + n;
        run_of(range.end - range.begin, wide)(p, rows, block, ahead);
      }
    }
    group = {group.end, group.end + next};
  }
}

}  // namespace linear
