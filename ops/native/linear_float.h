// Linear layers of floats. The outputs are cut into panels of one or two vectors. The weights of a
// panel lie together, and for some rows at a time its sums stay in registers.
//
// With few rows the time goes into fetching the weights, which a network reads once per image.
// While a panel is worked on, the next one is therefore fetched ahead.
#pragma once
#include <utility>
#include "linear_problem.h"

namespace linear {

// Two vectors of sums a row, two of weights, one input.
constexpr int MAX_ROWS = (simd::REGISTERS - 3) / 2;
constexpr int STEP = 4;  // products between two fetches

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

template <int R, int V>
static VB_INLINE void multiply(const Rows<float>& rows, const Block<float>& block, Ahead& ahead,
                               F (&sum)[R][V]) {
  const float* in[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    in[r] = block.in + r * rows.in_stride;
    VB_UNROLL
    for (int v = 0; v < V; v++) {
      sum[r][v] = simd::get(block.bias + v * W, v == V - 1 ? block.lanes : W);
    }
  }
  const float* weight = block.weight;
  const auto product = [&](int64_t k) VB_INLINE_LAMBDA {
    F w[V];
    VB_UNROLL
    for (int v = 0; v < V; v++, weight += W) w[v] = simd::in_register(simd::load(weight));
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const F x = simd::in_register(simd::set1(in[r][k]));
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = simd::fma(x, w[v], sum[r][v]);
    }
  };
  int64_t k = 0;
  for (; k + STEP <= rows.in_features; k += STEP) {
    ahead.fetch();
    VB_UNROLL
    for (int i = 0; i < STEP; i++) product(k + i);
  }
  for (; k < rows.in_features; k++) product(k);
}

template <int R, int V>
static void run(const Problem& p, const Rows<float>& rows, const Block<float>& block,
                Ahead& ahead) {
  F sum[R][V];
  multiply<R, V>(rows, block, ahead, sum);
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
  const int64_t blocks = (rows.count + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    const int64_t n = panel * PANEL, left = p.out_features - n;
    const bool wide = left > W, last = panel + 1 == panels.end;
    const float* weight = static_cast<const float*>(t.weight) + n * rows.in_features;
    const int64_t next = std::min<int64_t>(PANEL, padded(p.out_features) - n - PANEL);
    Ahead ahead(weight + PANEL * rows.in_features,
                last ? 0 : next * rows.in_features * int64_t{sizeof(float)},
                std::max<int64_t>(1, blocks * (rows.in_features / STEP)));
    Block<float> block{nullptr, weight, t.bias + n, nullptr, nullptr,
                       rows.energy ? rows.energy + n : nullptr,
                       static_cast<int>(std::min<int64_t>(W, wide ? left - W : left))};
    for (int64_t i = 0; i < blocks; i++) {
      const Range range = share(rows.count, i, blocks);
      block.in = rows.in + range.begin * rows.in_stride;
      block.out = rows.out + range.begin * p.out_stride + n;
      if (rows.other) block.other = rows.other + range.begin * p.other_stride + n;
      run_of(range.end - range.begin, wide)(p, rows, block, ahead);
    }
  }
}

}  // namespace linear
