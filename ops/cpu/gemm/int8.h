// Linear layers in int8: rows are quantised to bytes as they are copied, weights are signed bytes
// with one scale per output. Products are summed exactly, in 32 bits.
//
// Four inputs of a lane are multiplied at once (AVX512-VNNI, AVX-VNNI, SDOT), or tiles of 64 inputs
// (AMX).
#pragma once
#include "gemm/quantize.h"
#include "gemm/registers.h"
#include "gemm/tiles.h"

namespace linear {

#if VB_BYTES
// ---- micro-kernels in registers ----------------------------------------------------------------
#if VB_NEON
#define VB_DOT

// Adds the products of group LANE of x.
template <int LANE>
static VB_INLINE void add_bytes(I& sum, I x, I w) {
  __asm__(".arch_extension dotprod\n\tsdot %0.4s, %2.16b, %1.4b[%c3]"
          : "+w"(sum) : "w"(x), "w"(w), "i"(LANE));
}

template <int LANE, int R, int V>
static VB_INLINE void add_group(const I (&x)[R], const int8_t* weight, I (&sum)[R][V]) {
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const I w = load_vector(weight + (LANE * V + v) * W * GROUP);
    VB_UNROLL
    for (int r = 0; r < R; r++) add_bytes<LANE>(sum[r][v], x[r], w);
  }
}

// Adds the products of STEP groups.
template <int R, int V, int POINTERS>
static VB_INLINE void add_groups(const uint8_t* const (&in)[POINTERS], ptrdiff_t stride,
                                 const int8_t* weight, I (&sum)[R][V]) {
  static_assert(STEP == 4, "a vector has four groups");
  I x[R];
  VB_UNROLL
  for (int r = 0; r < R; r++) x[r] = load_vector(in[r / 3] + r % 3 * stride);
  add_group<0>(x, weight, sum);
  add_group<1>(x, weight, sum);
  add_group<2>(x, weight, sum);
  add_group<3>(x, weight, sum);
}

#else
#if VB_AVX512
#define VB_DOT __attribute__((target("avx512vnni")))
#define VB_DOT_PRODUCT "vpdpbusd %2, %1, %0"
#else
#define VB_DOT __attribute__((target("avxvnni")))
#define VB_DOT_PRODUCT "%{vex%} vpdpbusd %2, %1, %0"
#endif

static VB_INLINE VB_DOT void add_bytes(I& sum, I x, I w) {
  __asm__(VB_DOT_PRODUCT : "+v"(sum) : "v"(x), "v"(w));
}
static VB_INLINE I load_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return in_all_lanes(four);
}
static VB_INLINE I in_register(I v) {
  __asm__("" : "+v"(v));
  return v;
}

template <int R, int V, int POINTERS>
static VB_INLINE VB_DOT void add_groups(const uint8_t* const (&in)[POINTERS], ptrdiff_t stride,
                                        const int8_t* weight, I (&sum)[R][V]) {
  VB_UNROLL
  for (int i = 0; i < STEP; i++, weight += V * W * GROUP) {
    I w[V];
    VB_UNROLL
    for (int v = 0; v < V; v++) w[v] = in_register(load_vector(weight + v * W * GROUP));
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const I x = in_register(load_four(in[r / 3] + r % 3 * stride + i * GROUP));
      VB_UNROLL
      for (int v = 0; v < V; v++) add_bytes(sum[r][v], x, w[v]);
    }
  }
}
#endif

// The sums of R rows and V vectors of outputs, to `sums` [R][V][W].
template <int R, int V>
VB_DOT static void multiply_bytes_in_registers(const Bytes& rows, const int8_t* weight,
                                               Prefetch& prefetch, int32_t* sums) {
  Prefetch fetched = prefetch;
  constexpr int POINTERS = (R + 2) / 3;  // as in registers.h
  ptrdiff_t stride = rows.stride;
  const uint8_t* in[POINTERS];
  VB_UNROLL
  for (int r = 0; r < POINTERS; r++) in[r] = rows.in + 3 * r * stride;
  I sum[R][V];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) sum[r][v] = zeros();
  }
  // Inputs beyond the last group are zeros, as are their weights.
  for (int64_t k = 0; k < rows.in_features; k += STEP * GROUP) {
    fetched.fetch();
    add_groups(in, stride, weight, sum);
    weight += STEP * V * W * GROUP;
    VB_UNROLL
    for (int r = 0; r < POINTERS; r++) {
      in[r] += STEP * GROUP;
      __asm__("" : "+r"(in[r]));
    }
    __asm__("" : "+r"(stride));
  }
  prefetch = fetched;
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) store_vector(sums + (r * V + v) * W, sum[r][v]);
  }
}

using Multiply = void (*)(const Bytes&, const int8_t*, Prefetch&, int32_t*);

static Multiply multiply_of(int64_t rows, bool wide) {
  static constexpr auto kernels = variants<2>([](auto v) {
    return variants<MAX_ROWS>([](auto r) {
      return multiply_bytes_in_registers<r.value, decltype(v)::value>;
    });
  });
  return kernels[wide][rows - 1];
}

// The weights, scales and biases of a panel. With `sums`, the negative sums of scaled weights.
struct BytePanel {
  const int8_t* weight;
  const float *bias, *scale, *sum;
};

// Turns the sums of some rows, beginning at `first`, into outputs, and stores them. `bytes` and
// `block` begin at row 0.
template <int V, class T>
static void finish_bytes(const Problem& p, const Bytes& bytes, int64_t first, int64_t count,
                         const BytePanel& panel, const Block<T>& block, int32_t* sums) {
  F scales[V], zeros[V], biases[V];
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const int lanes = v == V - 1 ? block.lanes : W;
    scales[v] = simd::get(panel.scale + v * W, lanes);
    zeros[v] = simd::get(panel.sum + v * W, lanes);
    biases[v] = simd::get(panel.bias + v * W, lanes);
  }
  // Calls put(r, x, row) with each row's outputs and the memory of its sums.
  const auto each_row = [&](const auto& put) VB_INLINE_LAMBDA {
    int32_t* row = sums;
    const float *scale = bytes.scale + first, *shift = bytes.shift + first;
    for (int64_t r = 0; r < count; r++, row += V * W) {
      F x[V];
      VB_UNROLL
      for (int v = 0; v < V; v++) {
        const F start = simd::fma(simd::set1(shift[r]), zeros[v], biases[v]);
        const F sum = to_floats(load_vector(row + v * W));
        x[v] = simd::fma(sum, simd::set1(scale[r]) * scales[v], start);
      }
      put(r, x, row);
    }
  };
  const bool is_clip = activation::is_clip(p.activation);
  if (block.energy || !(is_clip || p.activation == activation::NONE)) {
    each_row([](int64_t, F (&x)[V], int32_t* row) VB_INLINE_LAMBDA {
      VB_UNROLL
      for (int v = 0; v < V; v++) simd::store(reinterpret_cast<float*>(row + v * W), x[v]);
    });
    return finish_rows<V>(p, block, first, count, reinterpret_cast<float*>(sums));
  }
  const ptrdiff_t stride = p.out_stride, other_stride = p.other_stride;
  T* const out = block.out + first * stride;
  const int lanes = block.lanes;
  // Stores each row after `change`.
  const auto put_rows = [&](const auto& change) VB_INLINE_LAMBDA {
    each_row([&](int64_t r, F (&x)[V], int32_t*) VB_INLINE_LAMBDA {
      change(r, x);
      put_row<V>(out + r * stride, x, lanes);
    });
  };
  const F limit = activation::clip_limit(p.activation);
  const auto clip = [&](int64_t, F (&x)[V]) VB_INLINE_LAMBDA {
    VB_UNROLL
    for (int v = 0; v < V; v++) x[v] = activation::clip(x[v], limit);
  };
  if (p.combination == NONE) {
    return is_clip ? put_rows(clip) : put_rows([](int64_t, F (&)[V]) {});
  }
  Combine combine[V];
  combine_panel(p, block, combine);
  const T* const other = block.other + first * other_stride;
  const bool clips = is_clip && !clips_sum(p);
  put_rows([&](int64_t r, F (&x)[V]) VB_INLINE_LAMBDA {
    if (clips) clip(r, x);
    combine_row(combine, other + r * other_stride, lanes, x);
  });
}

// The panel of the outputs from `n` on.
static BytePanel panel_at(const Problem& p, const Tensors& t, int64_t n) {
  const int8_t* const weight = static_cast<const int8_t*>(t.weight);
  const float* const scale = t.weight_scale + n;
  return {weight + std::min(n, padded(p.out_features)) * padded_bytes(p.in_features), t.bias + n,
          scale, scale + p.out_features};
}
template <class T>
static void run_bytes_in_registers(const Problem& p, const Tensors& t, const Rows<T>& rows,
                                   const Bytes& bytes, Range panels) {
  alignas(64) int32_t sums[MAX_ROWS * PANEL];
  const int64_t k = padded_bytes(p.in_features);
  const auto weight_of = [&](int64_t panel) { return panel_at(p, t, panel * PANEL).weight; };
  each_block(p, rows, panels, PANEL * k, k / GROUP / STEP, weight_of,
             [&](int64_t n, Range range, Prefetch& prefetch) VB_INLINE_LAMBDA {
    const int64_t height = length(range);
    Bytes own = bytes;
    own.in += range.begin * bytes.stride;
    const BytePanel panel = panel_at(p, t, n);
    const Block<T> block = block_at(p, t, rows, n);
    const bool wide = p.out_features - n > W;
    fetch_outputs(p, block, range.begin, height, wide ? PANEL : W);
    multiply_of(height, wide)(own, panel.weight, prefetch, sums);
    wide ? finish_bytes<2>(p, bytes, range.begin, height, panel, block, sums)
         : finish_bytes<1>(p, bytes, range.begin, height, panel, block, sums);
  });
}

// ---- micro-kernels in tiles --------------------------------------------------------------------
#if VB_AMX
// Of rows in bytes.
template <class T>
struct ByteEpilogue {
  const Problem* p;
  const Bytes* bytes;
  BytePanel panel;
  Block<T> block;  // of the first row
  bool wide;

  void finish(int64_t row, int64_t count, float* sums) const {
    int32_t* const whole = reinterpret_cast<int32_t*>(sums);
    wide ? finish_bytes<2>(*p, *bytes, row, count, panel, block, whole)
         : finish_bytes<1>(*p, *bytes, row, count, panel, block, whole);
  }
};

// Steps of 64 inputs whose rows and weights share the L1 cache.
constexpr int64_t MOST_STEPS = 12;

// With many inputs, a part of them at a time, so that their weights stay in the L1 cache.
template <int V, class T>
static void run_int8_panel(const Problem& p, const Rows<T>& rows, const Bytes& bytes,
                               const BytePanel& panel, const Block<T>& block, Prefetch& prefetch,
                               Unfinished<ByteEpilogue<T>>& unfinished) {
  static thread_local ScratchBuffer<float> buffer;
  constexpr int64_t height = 2 * TILE_ROWS;
  const int64_t steps = padded_bytes(bytes.in_features) / BYTE_INPUTS;
  const int64_t parts = rows.count > height ? (steps + MOST_STEPS - 1) / MOST_STEPS : 1;
  float* const between = parts > 1 ? buffer.of(round_up(rows.count, height) * V * W) : nullptr;
  for (int64_t part = 0; part < parts; part++) {
    const Range own = ::share(steps, part, parts);
    const int8_t* const weight = panel.weight + own.begin * V * TILE_ROWS * BYTE_INPUTS;
    for (int64_t row = 0; row < rows.count; row += height) {
      const TileRows tiles(row, rows.count);
      float* const kept = between ? between + row * V * W : nullptr;
      const float* const start = part ? kept : nullptr;
      float* const sums = part + 1 < parts ? kept : unfinished.next();
      multiply<V>(tiles, bytes.in + own.begin * BYTE_INPUTS, bytes.stride, weight, length(own),
                  start, V * W, prefetch, unfinished, sums);
      if (part + 1 < parts) continue;
      unfinished.start({&p, &bytes, panel, block, V == 2}, tiles, row,
                       std::min(row + height, rows.count));
    }
  }
}

template <class T>
static void run_int8_tiles(const Problem& p, const Tensors& t, const Rows<T>& rows,
                               const Bytes& bytes, Range panels) {
  const Tiles tiles;
  Unfinished<ByteEpilogue<T>> unfinished;
  const int64_t k = padded_bytes(p.in_features);
  const int64_t blocks = (rows.count + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  for (int64_t n = panels.begin * PANEL; n < std::min(panels.end * PANEL, p.out_features);
       n += PANEL) {
    const BytePanel panel = panel_at(p, t, n);
    const int64_t next = std::min<int64_t>(PANEL, padded(p.out_features) - n - PANEL);
    Prefetch prefetch(panel.weight + PANEL * k, n / PANEL + 1 == panels.end ? 0 : next * k,
                      blocks * (k / BYTE_INPUTS));
    const Block<T> block = block_at(p, t, rows, n);
    p.out_features - n > W
        ? run_int8_panel<2>(p, rows, bytes, panel, block, prefetch, unfinished)
        : run_int8_panel<1>(p, rows, bytes, panel, block, prefetch, unfinished);
  }
  unfinished.finish();
}
#else
template <class T>
static void run_int8_tiles(const Problem&, const Tensors&, const Rows<T>&, const Bytes&, Range) {
}
#endif

template <class T>
static void run_bytes(const Problem& p, const Tensors& t, const Rows<T>& rows, const Bytes& bytes,
                      Range panels) {
  has_tiles() ? run_int8_tiles<T>(p, t, rows, bytes, panels)
              : run_bytes_in_registers<T>(p, t, rows, bytes, panels);
}

// Multiplies rows from `first` on, which are bytes already, with some panels.
template <class T>
static void run_given_bytes(const Problem& p, const Tensors& t, int64_t first, const Rows<T>& rows,
                            Range panels) {
  static thread_local ScratchBuffer<float> numbers;
  float* const steps = numbers.of(2 * rows.count);
  const float step = t.in_range[0], zero = t.in_range[1];
  std::fill_n(steps, rows.count, step);
  std::fill_n(steps + rows.count, rows.count, step * (zero - OFFSET));
  const Bytes bytes{t.bytes + first * p.in_stride, p.in_stride, round_up(p.in_features, GROUP),
                    steps, steps + rows.count};
  run_bytes(p, t, rows, bytes, panels);
}

// Quantises rows and multiplies them with some panels.
template <class T>
static void run_quantised(const Problem& p, const Tensors& t, const T* in, const float* scale,
                          const Rows<T>& rows, Range panels) {
  static thread_local ScratchBuffer<uint8_t> buffer;
  static thread_local ScratchBuffer<float> numbers;
  const int64_t padded = padded_bytes(p.in_features);
  // An odd number of cache lines, so that rows do not map to the same sets of the L1 cache.
  const int64_t pitch = (padded / LINE | 1) * LINE;
  uint8_t* const copied = buffer.of(round_up(rows.count, TILE_ROWS) * pitch);
  float* const steps = numbers.of(2 * rows.count);
  for (int64_t first = 0; first < rows.count; first += ROWS_AT_ONCE) {
    const int64_t count = std::min(ROWS_AT_ONCE, rows.count - first);
    const T* const begin = in + first * p.in_stride;
    Limits limits[ROWS_AT_ONCE] = {};
    if (!t.in_range) {
      for (int64_t r = 0; r < count; r++) {
        limits[r] = limits_of(begin + r * p.in_stride, scale, p.in_features);
      }
    }
    const ByteRanges ranges =
        t.in_range ? ByteRanges(t.in_range[0], t.in_range[1]) : ByteRanges(limits);
    for (int64_t r = 0; r < count; r++) {
      const auto quantised = t.in_range ? quantise<true, T> : quantise<false, T>;
      const float step =
          ranges.step[r] + quantised(begin + r * p.in_stride, scale, p.in_features, padded,
                                     ranges.inverse[r], ranges.zero[r], copied + (first + r) * pitch);
      steps[first + r] = step;
      steps[rows.count + first + r] = step * (ranges.zero[r] - OFFSET);
    }
  }
  const Bytes bytes{copied, pitch, round_up(p.in_features, GROUP), steps, steps + rows.count};
  run_bytes(p, t, rows, bytes, panels);
}

// Quantises `count` values with one scale and zero, to a buffer of `count` rounded up to AT_ONCE.
// Returns whether all are finite.
template <class T>
static bool quantise_all(const T* in, int64_t count, const float* range, int64_t threads,
                         uint8_t* out) {
  const ByteRanges ranges(range[0], range[1]);
  const int64_t groups = (count + AT_ONCE - 1) / AT_ONCE;
  std::atomic<bool> finite = true;
  parallel::for_each(threads, threads, [&](int64_t index) {
    const Range own = share(groups, index, threads);
    const int64_t begin = own.begin * AT_ONCE, end = std::min(own.end * AT_ONCE, count);
    const float odd = quantise<true>(in + begin, nullptr, end - begin, length(own) * AT_ONCE,
                                     ranges.inverse[0], ranges.zero[0], out + begin);
    if (odd != 0) finite = false;
  });
  return finite;
}

#else
template <class T>
static void run_quantised(const Problem&, const Tensors&, const T*, const float*, const Rows<T>&,
                          Range) {}
template <class T>
static void run_given_bytes(const Problem&, const Tensors&, int64_t, const Rows<T>&, Range) {}
#endif

}  // namespace linear
