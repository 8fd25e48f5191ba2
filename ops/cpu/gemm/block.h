// The inputs of a linear micro-kernel, its prefetches, and its epilogue.
#pragma once
#include "gemm/problem.h"

namespace linear {

// The rows of one image, or all rows if images do not matter.
template <class T>
struct Rows {
  const Input<T>* in;
  int64_t in_stride, in_features;
  const T* other;
  T* out;
  float* energy;
  int64_t count;
};

// Some rows of one panel. The last vector has `lanes` outputs.
template <class T>
struct Block {
  const Input<T>* in;
  const T* weight;
  const float* bias;
  const T* other;
  T* out;
  float* energy;
  int lanes;
  const float* other_scale;
};

// The block of the outputs from `n` on, beginning with row 0, without operands.
template <class T>
static Block<T> block_at(const Problem& p, const Tensors& t, const Rows<T>& rows, int64_t n) {
  const int64_t left = p.out_features - n;
  return {nullptr,
          nullptr,
          t.bias + n,
          rows.other ? rows.other + n : nullptr,
          rows.out + n,
          rows.energy ? rows.energy + n : nullptr,
          static_cast<int>(std::min<int64_t>(W, left > W ? left - W : left)),
          t.other_scale ? t.other_scale + n : nullptr};
}

// Memory to prefetch, a few lines with every few products. It may run past the end, into data that
// are needed next.
struct Prefetch {
  const char* place;
  int64_t bytes_a_step;

  // `steps` calls of `fetch` prefetch `bytes`.
  Prefetch(const void* begin, int64_t bytes, int64_t steps)
      : place(static_cast<const char*>(begin)),
        bytes_a_step(round_up(bytes, steps * LINE) / steps) {}

  VB_INLINE void fetch() {
    for (const char* end = place + bytes_a_step; place < end; place += LINE) {
      __builtin_prefetch(place, 0, 2);
    }
  }
};

// Prefetches the memory of `width` outputs of `count` rows from `first` on, and of the terms to be
// added to them.
template <class T>
static VB_INLINE void fetch_outputs(const Problem& p, const Block<T>& block, int64_t first,
                                    int64_t count, int64_t width) {
  for (int64_t r = first; r < first + count; r++) {
    memory::fetch<memory::WRITE>(block.out + r * p.out_stride, width);
    if (block.other) memory::fetch<memory::READ>(block.other + r * p.other_stride, width);
  }
}

static VB_INLINE bool clips_sum(const Problem& p) {
  return p.combination == ADD_CLIPPED || p.combination == ADD_GATED;
}

// Combines a vector of outputs with that of `other`, in a copy of what the problem says of it: for
// all that a compiler knows, each store of an output might change the problem.
struct Combine {
  int64_t kind;
  bool clips;
  F limit, scale;  // of `other`, or with ADD_GATED of the output

  VB_INLINE Combine() {}
  VB_INLINE Combine(const Problem& p, const float* scales, int lanes)
      : kind(p.combination),
        clips(clips_sum(p) && activation::is_clip(p.activation)),
        limit(activation::clip_limit(p.activation)),
        scale(kind == ADD_SCALED || kind == ADD_GATED ? simd::get(scales, lanes) : simd::zero()) {}

  VB_INLINE F operator()(F x, F other) const {
    if (kind == MULTIPLY) return x * other;
    if (kind == ADD_SCALED) return simd::fma(other, scale, x);
    if (kind == ADD_GATED) x = x * scale;
    x = x + other;
    return clips ? activation::clip(x, limit) : x;
  }
};

// The epilogue: activation, combination, energies, and the stores of R rows of V vectors.
template <class T, int R, int V>
static VB_INLINE void finish(const Problem& p, const Block<T>& block, F (&sum)[R][V]) {
  if (clips_sum(p)) {
    // `combine` does it
  } else if (activation::is_clip(p.activation)) {
    const F limit = activation::clip_limit(p.activation);
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = activation::clip(sum[r][v], limit);
    }
  } else if (p.activation != activation::NONE) {
    F copy[R * V];  // so that the sums can stay in registers
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) copy[r * V + v] = sum[r][v];
    }
    activation::apply<T>(copy, R * V, p.activation);
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = copy[r * V + v];
    }
  }
  T* const out = block.out;
  float* const energies = block.energy;
  const ptrdiff_t stride = p.out_stride, other_stride = p.other_stride;
  if (p.combination == NONE && !energies) {
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int v = 0; v < V; v++) {
        simd::put(out + r * stride + v * W, sum[r][v], v == V - 1 ? block.lanes : W);
      }
    }
    return;
  }
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const int lanes = v == V - 1 ? block.lanes : W;
    const Combine combine(p, block.other_scale + v * W, lanes);
    const T* const others = block.other + v * W;
    F energy = simd::zero();
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      F x = sum[r][v];
      if (combine.kind != NONE) x = combine(x, simd::get(others + r * other_stride, lanes));
      if (energies) energy = simd::fma(x, x, energy);
      simd::put(out + r * stride + v * W, x, lanes);
    }
    if (energies) {
      float* const place = energies + v * W;
      simd::put(place, simd::get(place, lanes) + energy, lanes);
    }
  }
}

// Stores V vectors of a row, of which the last has `lanes` outputs.
template <int V, class T>
static VB_INLINE void put_row(T* out, const F (&x)[V], int lanes) {
  if constexpr (V == 2) {
    if (lanes == W) return simd::store_two(out, x[0], x[1]);
  }
  VB_UNROLL
  for (int v = 0; v < V; v++) simd::put(out + v * W, x[v], v == V - 1 ? lanes : W);
}

// The combinations of the V vectors of a panel.
template <int V, class T>
static VB_INLINE void combine_panel(const Problem& p, const Block<T>& block,
                                    Combine (&combine)[V]) {
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    combine[v] = Combine(p, block.other_scale + v * W, v == V - 1 ? block.lanes : W);
  }
}

template <int V, class T>
static VB_INLINE void combine_row(const Combine (&combine)[V], const T* other, int lanes,
                                  F (&x)[V]) {
  if (combine[0].kind == NONE) return;
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    x[v] = combine[v](x[v], simd::get(other + v * W, v == V - 1 ? lanes : W));
  }
}

// The epilogue of `count` rows from `first` on, whose sums in memory, [count][V][W], it modifies.
template <int V, class T>
static void finish_rows(const Problem& p, const Block<T>& block, int64_t first, int64_t count,
                        float* sums) {
  if (p.activation != activation::NONE && !clips_sum(p)) {
    activation::apply<T>(reinterpret_cast<F*>(sums), static_cast<int>(count * V), p.activation);
  }
  T* out = block.out + first * p.out_stride;
  if (p.combination == NONE && !block.energy) {
    for (int64_t r = 0; r < count; r++, out += p.out_stride, sums += V * W) {
      F x[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) x[v] = simd::load(sums + v * W);
      put_row<V>(out, x, block.lanes);
    }
    return;
  }
  const T* other = block.other + (p.combination ? first * p.other_stride : 0);
  Combine combine[V];
  combine_panel(p, block, combine);
  F energy[V];
  for (int v = 0; v < V; v++) energy[v] = simd::zero();
  for (int64_t r = 0; r < count; r++, out += p.out_stride, sums += V * W) {
    F x[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) x[v] = simd::load(sums + v * W);
    combine_row(combine, other, block.lanes, x);
    VB_UNROLL
    for (int v = 0; v < V; v++) energy[v] = simd::fma(x[v], x[v], energy[v]);
    put_row<V>(out, x, block.lanes);
    if (p.combination) other += p.other_stride;
  }
  if (!block.energy) return;
  for (int v = 0; v < V; v++) {
    const int lanes = v == V - 1 ? block.lanes : W;
    float* const place = block.energy + v * W;
    simd::put(place, simd::get(place, lanes) + energy[v], lanes);
  }
}

}  // namespace linear
