// Linear layers with accumulators in registers. The outputs are split into panels of one or two
// vectors. A panel's weights are contiguous, and the sums of a few rows at a time are in registers.
//
// With few rows, most of the time is spent on loading the weights, which a network reads once per
// image. The weights of the next panels are therefore prefetched.
#pragma once
#include "gemm/block.h"
#include "gemm/pack.h"

namespace linear {

// Registers: two vectors of sums per row, two of weights, one input. With NEON: one vector of
// inputs per row, and a quarter of the registers for weights.
constexpr int MAX_ROWS = VB_NEON ? simd::REGISTERS / 4 : (simd::REGISTERS - 3) / 2;
constexpr int STEP = 4;  // products between two prefetches
constexpr int64_t SUMMED = 512;  // inputs per running sum; longer sums lose precision
// A group of panels stays in the L2 cache while a block of rows, which is multiplied with all of
// them, stays in the L1 cache. With few blocks a group is one panel.
constexpr int64_t GROUP_BYTES = 512 * 1024, MIN_BLOCKS = 16;

// Two bfloat16 of a lane. A pair of weights has the place of a float. On CPUs without products of
// bfloat16, its two halves are multiplied as floats, one after the other.
struct Pair {
  BFloat16 first, second;
};

template <class T>
constexpr int PARTS = sizeof(Input<T>) / sizeof(T);

// The packed layout of the vectors of weights for one product and the next, in vectors of T.
template <class T>
constexpr int64_t NEXT_VECTOR = INPUTS<T> == 1 ? 1 : TILE_ROWS;
template <class T, int V>
constexpr int64_t NEXT_PRODUCT = INPUTS<T> == 1 ? V : 1;

template <class T>
static VB_INLINE F load_weights(const T* place, int part) {
  if constexpr (PARTS<T> == 2) return simd::load_of_pairs(place, part);
  return simd::load(reinterpret_cast<const float*>(place));
}
static VB_INLINE F load_input(const float* place) { return simd::set1(*place); }

// sum += x * w, in the type that the first argument points to. The result stays in the register of
// the sum: given a choice among the forms of the instruction, compilers move sums between registers
// or even spill them. With `half`, only the first half of the lanes: on CPUs with units of 256 bits,
// such as Zen 4, this takes half the time.
static VB_INLINE void add_product(const float*, F& sum, F x, F w,
                                 [[maybe_unused]] bool half = false) {
#if VB_AVX512 && !defined(__clang__)  // which has no name for half of an operand
  if (half) {
    __asm__("vfmadd231ps %t2, %t1, %t0" : "+v"(sum) : "v"(x), "v"(w));
    return;
  }
#endif
#if VB_AVX512 || VB_AVX2
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#else
  sum = simd::fma(x, w, sum);
#endif
}

#if VB_BFLOAT16
static VB_INLINE F load_input(const BFloat16* place) {
  int32_t pair;
  std::memcpy(&pair, place, sizeof pair);
#if VB_NEON
  return vreinterpretq_f32_s32(vdupq_n_s32(pair));
#else
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
#endif
}
static VB_INLINE F load_input(const Pair* place) { return load_input(&place->first); }

static VB_INLINE void add_product(const BFloat16*, F& sum, F x, F w,
                                 [[maybe_unused]] bool half = false) {
#if VB_NEON
  sum = simd::add_pairs(sum, x, w);
#else
#if !defined(__clang__)
  if (half) {
    __asm__("vdpbf16ps %t2, %t1, %t0" : "+v"(sum) : "v"(x), "v"(w));
    return;
  }
#endif
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
}
static VB_INLINE void add_product(const Pair* in, F& sum, F x, F w, bool half = false) {
  add_product(&in->first, sum, x, w, half);
}
#endif

#if VB_NEON
// The instruction takes a lane as its operand, so no broadcast is needed.
template <int LANE>
static VB_INLINE void add_product_of(const float*, F& sum, F x, F w) {
  sum = vfmaq_laneq_f32(sum, w, x, LANE);
}
#if VB_BFLOAT16
template <int LANE>
static VB_INLINE void add_product_of(const BFloat16*, F& sum, F x, F w) {
  sum = vbfdotq_laneq_f32(sum, vreinterpretq_bf16_f32(w), vreinterpretq_bf16_f32(x), LANE);
}
template <int LANE>
static VB_INLINE void add_product_of(const Pair* in, F& sum, F x, F w) {
  add_product_of<LANE>(&in->first, sum, x, w);
}
#endif

// Product J of those that `add_products` adds per step. The first of W products loads the
// contiguous inputs of all W.
template <int J, class T, int R, int V, size_t P>
static VB_INLINE void add_lane(const Input<T>* const (&in)[P], ptrdiff_t stride, const T* weight,
                               F (&x)[R], F (&sum)[R][V]) {
  constexpr int I = J / PARTS<T>, PART = J % PARTS<T>;
  if constexpr (J % W == 0) {
    __asm__("" : : : "memory");  // prevents loads before registers are free
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const auto* place = in[r / 3] + r % 3 * stride + I * INPUTS<T> + PART;
      x[r] = simd::read<F>(place);
    }
  }
  F w[V];
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    constexpr int64_t VECTOR = W * INPUTS<T>;
    w[v] = load_weights(weight + (I * NEXT_PRODUCT<T, V> + v * NEXT_VECTOR<T>) * VECTOR, PART);
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) add_product_of<J % W>(in[0], sum[r][v], x[r], w[v]);
  }
}
template <class T, int R, int V, size_t P, int... J>
static VB_INLINE void add_lanes(const Input<T>* const (&in)[P], ptrdiff_t stride, const T* weight,
                                F (&sum)[R][V], std::integer_sequence<int, J...>) {
  F x[R];
  (add_lane<J>(in, stride, weight, x, sum), ...);
}
#endif

template <class T, int R, int V>
static VB_INLINE void start(const Block<T>& block, F (&sum)[R][V]) {
  VB_UNROLL
  for (int v = 0; v < V; v++) {
    const F bias = simd::get(block.bias + v * W, v == V - 1 ? block.lanes : W);
    VB_UNROLL
    for (int r = 0; r < R; r++) sum[r][v] = bias;
  }
}

// Adds `count` products of inputs and weights per row; the first row begins at `first`. Returns the
// end of the weights. `fetch` is called before every `S` products. With HALF, only half of the last
// vector is needed.
template <int S, bool HALF = false, class T, int R, int V, class Fetch>
static VB_INLINE const T* add_products(const Input<T>* first, ptrdiff_t stride, int64_t count,
                                       const T* weight, const Fetch& fetch, F (&sum)[R][V]) {
  // Every third row has a pointer, since there are too few registers for one per row; the others
  // are addressed one or two strides from it.
  constexpr int POINTERS = (R + 2) / 3;
  constexpr int64_t VECTOR = W * INPUTS<T>;
  const Input<T>* in[POINTERS];
  VB_UNROLL
  for (int r = 0; r < POINTERS; r++) in[r] = first + 3 * r * stride;
  const auto products = [&](auto steps) VB_INLINE_LAMBDA {
    constexpr int COUNT = decltype(steps)::value;
#if VB_NEON
    if constexpr (COUNT == W) {
      add_lanes(in, stride, weight, sum, std::make_integer_sequence<int, COUNT * PARTS<T>>());
      weight += COUNT * NEXT_PRODUCT<T, V> * VECTOR;
    } else
#endif
    VB_UNROLL
    for (int i = 0; i < COUNT; i++, weight += NEXT_PRODUCT<T, V> * VECTOR) {
      VB_UNROLL
      for (int part = 0; part < PARTS<T>; part++) {
        F w[V];
        VB_UNROLL
        for (int v = 0; v < V; v++) {
          w[v] = simd::in_register(load_weights(weight + v * NEXT_VECTOR<T> * VECTOR, part));
        }
        VB_UNROLL
        for (int r = 0; r < R; r++) {
          const auto* place = in[r / 3] + r % 3 * stride + i * INPUTS<T> + part;
          const F x = simd::in_register(load_input(place));
          VB_UNROLL
          for (int v = 0; v < V; v++) {
            add_product(first, sum[r][v], x, w[v], HALF && v == V - 1);
          }
        }
      }
    }
    VB_UNROLL
    for (int r = 0; r < POINTERS; r++) {
      in[r] += COUNT * INPUTS<T>;
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

// Adds the products of all inputs for some rows of one panel.
template <bool HALF, class T, int R, int V>
static VB_INLINE void add_rows(const Rows<T>& rows, const Block<T>& block, Prefetch& prefetch,
                               F (&sum)[R][V]) {
  Prefetch fetched = prefetch;
  const auto fetch = [&]() VB_INLINE_LAMBDA { fetched.fetch(); };
  if constexpr (INPUTS<T> == 1) {
    add_products<STEP, HALF>(block.in, rows.in_stride, rows.in_features, block.weight, fetch, sum);
  } else {
    const T* weight = block.weight;
    for (int64_t k = 0; k < rows.in_features; k += TILE_INPUTS, weight += V * W * TILE_INPUTS) {
      const int64_t count = std::min(TILE_INPUTS, rows.in_features - k) / INPUTS<T>;
      add_products<STEP, HALF>(block.in + k, rows.in_stride, count, weight, fetch, sum);
    }
  }
  prefetch = fetched;
}

// Adds `before` [R][V][W], the sums of the preceding inputs.
template <int R, int V>
static VB_INLINE void add_sums(const float* before, F (&sum)[R][V]) {
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) sum[r][v] = sum[r][v] + simd::load(before + (r * V + v) * W);
  }
}

// The last inputs of some rows. `sums` are the sums of the preceding inputs, or null.
template <class T, int R, int V, bool HALF>
static void run(const Problem& p, const Rows<T>& rows, const Block<T>& block, Prefetch& prefetch,
                float* sums) {
  F sum[R][V];
  start(block, sum);
  add_rows<HALF>(rows, block, prefetch, sum);
  if (sums) add_sums(sums, sum);
  finish<T, R, V>(p, block, sum);
}

// Inputs before the last ones; the results go to `sums`.
template <class T, int R, int V, bool HALF>
static void run_first(const Problem&, const Rows<T>& rows, const Block<T>& block, Prefetch& prefetch,
                      float* sums) {
  F sum[R][V] = {};
  add_rows<HALF>(rows, block, prefetch, sum);
  add_sums(sums, sum);
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int v = 0; v < V; v++) simd::store(sums + (r * V + v) * W, sum[r][v]);
  }
}

template <class T>
using Run = void (*)(const Problem&, const Rows<T>&, const Block<T>&, Prefetch&, float*);

// The functions for some rows: for inputs before the last ones, and for the last ones.
template <class T>
struct Runs {
  Run<T> first, last;
};

// Of panels whose last vector has all of its lanes, or half of them at most.
#if VB_AVX512
constexpr int HALVES = 2;
#else
constexpr int HALVES = 1;
#endif
static bool is_half(int lanes) { return HALVES == 2 && lanes <= W / 2; }

// For a panel of one vector or two, if `wide`, of which the last has `lanes` outputs.
template <class T>
static Runs<T> runs_of(int64_t rows, bool wide, int lanes) {
  static constexpr auto runs = variants<HALVES>([](auto half) {
    return variants<2>([](auto v) {
      return variants<MAX_ROWS>([](auto r) {
        constexpr int V = decltype(v)::value;
        constexpr bool HALF = decltype(half)::value == 2;
        return Runs<T>{run_first<T, r.value, V, HALF>, run<T, r.value, V, HALF>};
      });
    });
  });
  return runs[is_half(lanes)][wide][rows - 1];
}

// Some rows of one panel, with inputs summed in parts.
template <class T>
static VB_INLINE void run_block(const Problem& p, Rows<T> rows, Block<T> block, int64_t count,
                                bool wide, Prefetch& prefetch) {
  const Runs<T> runs = runs_of<T>(count, wide, block.lanes);
  fetch_outputs(p, block, 0, count, wide ? PANEL : W);
  if (rows.in_features <= SUMMED) return runs.last(p, rows, block, prefetch, nullptr);
  alignas(64) float sums[MAX_ROWS * PANEL] = {};
  int64_t left = rows.in_features;
  rows.in_features = SUMMED;
  for (; left > SUMMED; left -= SUMMED) {
    runs.first(p, rows, block, prefetch, sums);
    block.in += SUMMED;
    block.weight += SUMMED * (wide ? PANEL : W);
  }
  rows.in_features = left;
  runs.last(p, rows, block, prefetch, sums);
}

// Whether outputs are written row by row, as they lie in memory, instead of panel by panel: those
// of many rows, multiplied with weights that stay in the L2 cache.
template <class T>
static bool writes_whole_rows(const Problem& p, const Rows<T>& rows, Range panels, int64_t bytes) {
  const bool whole = p.out_stride == p.out_features && length(panels) * PANEL >= p.out_features;
  const bool others = !rows.other || p.other_stride == p.out_features;
  return whole && others && length(panels) * bytes <= GROUP_BYTES &&
         rows.count >= length(panels) * MIN_BLOCKS * MAX_ROWS;
}

// See `each_block`.
template <class T, class Weight, class Work>
static VB_INLINE void each_row_block(const Problem& p, const Rows<T>& rows, int64_t blocks,
                                     const Weight* weights, const Work& work) {
  Prefetch prefetch(weights, 0, 1);
  for (int64_t i = 0; i < blocks; i++) {
    const Range range = share(rows.count, i, blocks), next = share(rows.count, i + 1, blocks);
    for (int64_t n = 0; n < p.out_features; n += PANEL) {
      if (i + 1 < blocks) {  // a part of the next block's memory
        const int64_t begin = next.begin * p.out_features + n * length(next);
        const int64_t count = std::min<int64_t>(PANEL, p.out_features - n) * length(next);
        memory::fetch<memory::WRITE>(rows.out + begin, count);
        if (rows.other) memory::fetch<memory::READ>(rows.other + begin, count);
      }
      work(n, range, prefetch);
    }
  }
}

// Calls work(n, range, prefetch) for the panel of outputs from `n` on and the rows in `range`.
// `weight_of` gives the address of a panel's weights, which take up `bytes` and are multiplied in
// `steps` calls of Prefetch::fetch.
template <class T, class WeightOf, class Work>
static VB_INLINE void each_block(const Problem& p, const Rows<T>& rows, Range panels,
                                 int64_t bytes, int64_t steps, const WeightOf& weight_of,
                                 const Work& work) {
  const int64_t blocks = (rows.count + MAX_ROWS - 1) / MAX_ROWS;
  if (writes_whole_rows(p, rows, panels, bytes)) {
    return each_row_block(p, rows, blocks, weight_of(0), work);
  }
  const int64_t fitting = std::max<int64_t>(1, GROUP_BYTES / bytes);
  // Each group is twice as large as the one before: the weights of the first group cannot be
  // prefetched.
  Range group{panels.begin, panels.begin + 1};
  while (group.begin < panels.end) {
    const int64_t count = length(group);
    const int64_t next =
        std::min({blocks < MIN_BLOCKS ? 1 : 2 * count, fitting, panels.end - group.end});
    const auto* const ahead = weight_of(group.end);
    Prefetch prefetch(ahead, (weight_of(group.end + next) - ahead) * int64_t{sizeof *ahead},
                      std::max<int64_t>(1, count * blocks * steps));
    for (int64_t i = 0; i < blocks; i++) {
      const Range range = share(rows.count, i, blocks);
      for (int64_t panel = group.begin; panel < group.end; panel++) {
        work(panel * PANEL, range, prefetch);
      }
    }
    group = {group.end, group.end + next};
  }
}

template <class T>
static void run_in_registers(const Problem& p, const Tensors& t, const Rows<T>& rows,
                             Range panels) {
  const T* const weights = static_cast<const T*>(t.weight);
  const int64_t k = padded_inputs(weights, rows.in_features), bytes = PANEL * k * int64_t{sizeof(T)};
  const auto weight_of = [&](int64_t panel) {
    return weights + std::min(panel * PANEL, padded(p.out_features)) * k;
  };
  const auto work = [&](int64_t n, Range range, Prefetch& prefetch) VB_INLINE_LAMBDA {
    Block<T> block = block_at(p, t, rows, n);
    block.in = rows.in + range.begin * rows.in_stride;
    block.weight = weight_of(n / PANEL);
    block.out += range.begin * p.out_stride;
    if (block.other) block.other += range.begin * p.other_stride;
    run_block(p, rows, block, length(range), p.out_features - n > W, prefetch);
  };
  each_block(p, rows, panels, bytes, k / INPUTS<T> / STEP, weight_of, work);
}

}  // namespace linear
