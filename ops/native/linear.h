// A linear layer with what stands around it in a network: activation, shortcut or gate, scales of
// its inputs, energies of its outputs. The outputs are cut into panels of one or two vectors. The
// weights of a panel lie together, and for some rows at a time its sums stay in registers.
//
// With few rows the time goes into fetching the weights, which a network reads once per image.
// While a panel is worked on, the next one is therefore fetched ahead.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "activation.h"
#include "lanes.h"
#include "simd.h"

namespace linear {

using simd::F;
using simd::W;

// ops/linear.py has the same fields in the same order. Strides are from row to row, in elements.
struct Problem {
  int64_t rows, in_features, out_features, in_stride, out_stride, other_stride;
  int64_t image_rows;  // that share their scales and energies
  int64_t activation, combination, threads;
};

// The order is that of COMBINATIONS in ops/linear.py: after the activation, what is done with
// `other`.
enum Combination : int64_t { NONE, ADD, MULTIPLY };

// `weight` as `pack` gives it, `bias` [out_features]. Null where it is not wanted: `other`
// [rows][out_features], `scale` [images][in_features], by which inputs are multiplied, and `energy`
// [images][out_features], which receives the sums of squared outputs.
struct Tensors {
  const float* in;
  const float* weight;
  const float* bias;
  const float* other;
  const float* scale;
  float* out;
  float* energy;
};

constexpr int PANEL = 2 * W;
// Two vectors of sums a row, two of weights, one input.
constexpr int MAX_ROWS = (simd::REGISTERS - 3) / 2;
constexpr int64_t LINE = 64 / sizeof(float);
// Inputs that are read again for every panel; they share a core's second-level cache with a panel.
constexpr int64_t INPUT_FLOATS = 192 * 1024;
constexpr int64_t MIN_CHUNK = 8 * MAX_ROWS;

// [out_features][in_features] → [panels][in_features][vectors of the panel], zeros at the end.
// A last panel that needs one vector only has one.
static int64_t padded(int64_t out_features) { return (out_features + W - 1) / W * W; }

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

// Lines of memory to be fetched, some with every few products.
struct Ahead {
  const float* place;
  int64_t lines, lines_a_step;
};

constexpr int STEP = 4;  // products between two fetches

// Some rows of one panel. `lanes` of the last vector are outputs.
struct Block {
  const float* in;
  const float* weight;
  const float* bias;
  const float* other;
  float* out;
  float* energy;
  int lanes;
};

template <int R, int V>
static VB_INLINE void multiply(const Problem& p, const Block& block, Ahead& ahead, F (&sum)[R][V]) {
  const float* in[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    in[r] = block.in + r * p.in_stride;
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
  for (; k + STEP <= p.in_features; k += STEP) {
    for (int64_t i = std::min(ahead.lines, ahead.lines_a_step); i > 0; i--) {
      __builtin_prefetch(ahead.place, 0, 2);
      ahead.place += LINE;
      ahead.lines--;
    }
    VB_UNROLL
    for (int i = 0; i < STEP; i++) product(k + i);
  }
  for (; k < p.in_features; k++) product(k);
}

template <int R, int V>
static void run(const Problem& p, const Block& block, Ahead& ahead) {
  F sum[R][V];
  multiply<R, V>(p, block, ahead, sum);
  if (p.activation != activation::NONE) activation::apply(&sum[0][0], R * V, p.activation);
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const int lanes = v == V - 1 ? block.lanes : W;
    F energy = simd::zero();
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      F x = sum[r][v];
      if (p.combination != NONE) {
        const F other = simd::get(block.other + r * p.other_stride + v * W, lanes);
        x = p.combination == ADD ? x + other : x * other;
      }
      if (block.energy) energy = simd::fma(x, x, energy);
      simd::put(block.out + r * p.out_stride + v * W, x, lanes);
    }
    if (block.energy) {
      float* place = block.energy + v * W;
      simd::put(place, simd::get(place, lanes) + energy, lanes);
    }
  }
}

using Run = void (*)(const Problem&, const Block&, Ahead&);

template <int V, size_t... I>
static Run run_of(int64_t rows, std::index_sequence<I...>) {
  static constexpr Run runs[] = {run<I + 1, V>...};
  return runs[rows - 1];
}

static Run run_of(int64_t rows, bool wide) {
  constexpr std::make_index_sequence<MAX_ROWS> variants;
  return wide ? run_of<2>(rows, variants) : run_of<1>(rows, variants);
}

// Rows and panels of one thread.
struct Range {
  int64_t begin, end;
};

static Range share(int64_t count, int64_t index, int64_t shares) {
  return {count * index / shares, count * (index + 1) / shares};
}

// The rows of one image, or all where images do not matter.
struct Rows {
  const float* in;
  const float* other;
  float* out;
  float* energy;
  int64_t count;
};

static void run_panels(const Problem& p, const Tensors& t, const Rows& rows, Range panels) {
  const int64_t blocks = (rows.count + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    const int64_t n = panel * PANEL, left = p.out_features - n;
    const bool wide = left > W, last = panel + 1 == panels.end;
    const float* weight = t.weight + n * p.in_features;
    const int64_t next = std::min<int64_t>(PANEL, padded(p.out_features) - n - PANEL);
    const int64_t lines = last ? 0 : (next * p.in_features + LINE - 1) / LINE;
    const int64_t steps = std::max<int64_t>(1, blocks * (p.in_features / STEP));
    Ahead ahead{weight + PANEL * p.in_features, lines, (lines + steps - 1) / steps};
    Block block{nullptr, weight, t.bias + n, nullptr, nullptr, nullptr,
                static_cast<int>(std::min<int64_t>(W, wide ? left - W : left))};
    if (rows.energy) block.energy = rows.energy + n;
    for (int64_t i = 0; i < blocks; i++) {
      const Range range = share(rows.count, i, blocks);
      block.in = rows.in + range.begin * p.in_stride;
      block.out = rows.out + range.begin * p.out_stride + n;
      if (rows.other) block.other = rows.other + range.begin * p.other_stride + n;
      run_of(range.end - range.begin, wide)(p, block, ahead);
    }
  }
}

// Rows `begin` … of one image, or of all of them without scales and energies.
static void run_rows(const Problem& p, const Tensors& t, Range range, Range panels) {
  static thread_local std::vector<float> scaled;
  const int64_t image = p.image_rows ? range.begin / p.image_rows : 0;
  const int64_t fitting = std::max(MIN_CHUNK, INPUT_FLOATS / p.in_features);
  const int64_t count = range.end - range.begin, chunks = (count + fitting - 1) / fitting;
  for (int64_t i = 0; i < chunks; i++) {
    Range chunk = share(count, i, chunks);
    const int64_t first = range.begin + chunk.begin;
    Rows rows{t.in + first * p.in_stride, nullptr, t.out + first * p.out_stride, nullptr,
              chunk.end - chunk.begin};
    if (t.other) rows.other = t.other + first * p.other_stride;
    if (t.energy) rows.energy = t.energy + image * p.out_features;
    if (!t.scale) {
      run_panels(p, t, rows, panels);
      continue;
    }
    const float* scale = t.scale + image * p.in_features;
    scaled.resize(static_cast<size_t>(rows.count * p.in_features));
    float* out = scaled.data();
    for (int64_t r = 0; r < rows.count; r++, out += p.in_features) {
      const float* in = rows.in + r * p.in_stride;
      for (int64_t k = 0; k < p.in_features; k++) out[k] = in[k] * scale[k];
    }
    rows.in = scaled.data();
    Problem dense = p;
    dense.in_stride = p.in_features;
    run_panels(dense, t, rows, panels);
  }
}

static void forward(const Problem& p, const Tensors& t) {
  const int64_t panels = (p.out_features + PANEL - 1) / PANEL;
  if (t.energy) {
    std::fill_n(t.energy, p.rows / p.image_rows * p.out_features, 0.f);
  }
  // A thread takes some of the panels where the weights are the most to read, else some rows.
  const bool by_panels = t.energy || p.out_features > p.rows;
  const auto work = [&](int64_t index, int64_t threads) {
    const Range own_panels = by_panels ? share(panels, index, threads) : Range{0, panels};
    const Range own = by_panels ? Range{0, p.rows} : share(p.rows, index, threads);
    const int64_t image_rows = p.image_rows ? p.image_rows : p.rows;
    for (int64_t row = own.begin; row < own.end;) {
      const int64_t end = std::min(own.end, (row / image_rows + 1) * image_rows);
      run_rows(p, t, {row, end}, own_panels);
      row = end;
    }
  };
#if defined(_OPENMP)
  const int64_t threads = std::min(p.threads, by_panels ? panels : p.rows);
  if (threads > 1) {
    bool failed = false;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t i = 0; i < threads; i++) {
      try {
        work(i, threads);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  work(0, 1);
}

}  // namespace linear
