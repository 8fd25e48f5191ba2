// Gated linear attention, backward: states are stored per chunk and recomputed within a chunk while
// gradients pass through it. Lanes are channels of the keys, since three of the four gradients are
// sums over the values.
#pragma once
#include "common/lane_sums.h"
#include "scan/problem.h"

namespace gated_scan {

// Gradients are float32 and contiguous; those of gates are with respect to their logarithms. The
// bonus is not handled.
struct BackwardTensors {
  Sequence query, key, value;
  Sequence gate, gate_back;  // logarithms, in float32; the second may be null
  Sequence grad_out;
  float *grad_query, *grad_key, *grad_value;
  float *grad_gate, *grad_gate_back;
};

namespace backward {

constexpr int ROWS = 2;                                 // per tile: channels of the values
constexpr int COLUMNS = simd::REGISTERS == 32 ? 6 : 4;  // vectors of channels of the keys

// A chunk in the order of its direction, and its gradients, [CHUNK][keys] or [CHUNK][values].
struct Pieces {
  int64_t keys, values;
  float *query, *key, *gate, *value, *grad;  // `grad`: of the output, times the scale
  float *grad_query, *grad_key, *grad_gate;
  float* products;  // [CHUNK][values][W]: partial sums of the gradient of the values
  float* states;    // [CHUNK + 1][ROWS][COLUMNS][W] of a tile
};

// Advances the state by one token.
template <int C>
static VB_INLINE void step(F (&state)[ROWS][C], const float* gate, const float* key,
                           const float* value) {
  VB_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const F v = simd::set1(value[r]);
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      state[r][c] = simd::fma(state[r][c], simd::load(gate + c * W), simd::load(key + c * W) * v);
    }
  }
}

template <int C>
static VB_INLINE void load_tile(const float* in, int64_t pitch, F (&tile)[ROWS][C]) {
  VB_UNROLL
  for (int r = 0; r < ROWS; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) tile[r][c] = simd::load(in + r * pitch + c * W);
  }
}

template <int C>
static VB_INLINE void store_tile(const F (&tile)[ROWS][C], float* out, int64_t pitch) {
  VB_UNROLL
  for (int r = 0; r < ROWS; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) simd::store(out + r * pitch + c * W, tile[r][c]);
  }
}

// `state` and `grad_state` are [values][keys].
template <int C>
static void pass_state(const Pieces& p, int count, int64_t row, int64_t column, float* state) {
  F tile[ROWS][C];
  float* const place = state + row * p.keys + column;
  load_tile(place, p.keys, tile);
  for (int i = 0; i < count; i++) {
    const int64_t at = i * p.keys + column;
    step(tile, p.gate + at, p.key + at, p.value + i * p.values + row);
  }
  store_tile(tile, place, p.keys);
}

template <int C, bool APART>
static void pass_gradients(const Pieces& p, int count, int64_t row, int64_t column,
                           const float* state, float* grad_state) {
  constexpr int64_t PITCH = COLUMNS * W, STATE = ROWS * PITCH;
  F tile[ROWS][C];
  load_tile(state + row * p.keys + column, p.keys, tile);
  store_tile(tile, p.states, PITCH);
  for (int i = 0; i < count; i++) {
    const int64_t at = i * p.keys + column;
    const float* const grad = p.grad + i * p.values + row;
    F sum[C];
    VB_UNROLL
    for (int c = 0; c < C; c++) sum[c] = simd::load(p.grad_query + at + c * W);
    if (!APART) step(tile, p.gate + at, p.key + at, p.value + i * p.values + row);
    VB_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const F g = simd::set1(grad[r]);
      VB_UNROLL
      for (int c = 0; c < C; c++) sum[c] = simd::fma(tile[r][c], g, sum[c]);
    }
    if (APART) step(tile, p.gate + at, p.key + at, p.value + i * p.values + row);
    VB_UNROLL
    for (int c = 0; c < C; c++) simd::store(p.grad_query + at + c * W, sum[c]);
    store_tile(tile, p.states + (i + 1) * STATE, PITCH);
  }
  float* const place = grad_state + row * p.keys + column;
  load_tile(place, p.keys, tile);  // from here on, `tile` is the gradient of the state
  for (int i = count - 1; i >= 0; i--) {
    const int64_t at = i * p.keys + column;
    const float* const before = p.states + i * STATE;
    const float* const value = p.value + i * p.values + row;
    const float* const grad = p.grad + i * p.values + row;
    F product[ROWS], own[ROWS];
    VB_UNROLL
    for (int r = 0; r < ROWS; r++) {
      product[r] = simd::load(p.products + (i * p.values + row + r) * W);
      own[r] = simd::set1(grad[r]);
    }
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      const F query = simd::load(p.query + at + c * W), key = simd::load(p.key + at + c * W);
      const F gate = simd::load(p.gate + at + c * W);
      F of_key = simd::load(p.grad_key + at + c * W);
      F of_gate = simd::load(p.grad_gate + at + c * W);
      VB_UNROLL
      for (int r = 0; r < ROWS; r++) {
        F g = APART ? tile[r][c] : simd::fma(query, own[r], tile[r][c]);
        of_key = simd::fma(g, simd::set1(value[r]), of_key);
        of_gate = simd::fma(g, simd::load(before + r * PITCH + c * W), of_gate);
        product[r] = simd::fma(g, key, product[r]);
        tile[r][c] = APART ? simd::fma(query, own[r], g * gate) : g * gate;
      }
      simd::store(p.grad_key + at + c * W, of_key);
      simd::store(p.grad_gate + at + c * W, of_gate);
    }
    VB_UNROLL
    for (int r = 0; r < ROWS; r++) {
      simd::store(p.products + (i * p.values + row + r) * W, product[r]);
    }
  }
  store_tile(tile, place, p.keys);
}

// Calls work(std::integral_constant<int, vectors>, row, column) for each tile.
template <class Work>
static void each_tile(const Pieces& p, const Work& work) {
  for (int64_t row = 0; row < p.values; row += ROWS) {
    for (int64_t column = 0; column < p.keys; column += COLUMNS * W) {
      with_constant<COLUMNS>(std::min<int64_t>(COLUMNS, (p.keys - column) / W),
                             [&](auto vectors) { work(vectors, row, column); });
    }
  }
}

// Writes rows of a chunk's gradient to their destination, or adds them to it.
static void give(const Problem& p, const Head& at, const Span& span, const float* in, int64_t pitch,
                 int64_t dim, bool add, float* out) {
  for (int i = 0; i < span.count; i++) {
    float* to = out + ((at.image * p.tokens + span.token(i)) * p.heads + at.head) * dim;
    for (int64_t c = 0; c < dim; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, dim - c));
      const F x = simd::load(in + i * pitch + c);
      simd::put(to + c, add ? x + simd::get(to + c, lanes) : x, lanes);
    }
  }
}

template <class T>
static void differentiate(const Problem& p, const BackwardTensors& t, const Head& at) {
  static thread_local ScratchBuffer<float> buffers[2];
  Pieces s;
  s.keys = simd::round_up(p.dim, W);
  s.values = simd::round_up(p.value_dim, W);
  const int64_t state = s.keys * s.values, of_keys = CHUNK * s.keys, of_values = CHUNK * s.values;
  const int64_t chunks = (p.tokens + CHUNK - 1) / CHUNK;
  s.query = buffers[0].of(6 * of_keys + (2 + W) * of_values + (CHUNK + 1) * ROWS * COLUMNS * W);
  s.key = s.query + of_keys;
  s.gate = s.key + of_keys;
  s.grad_query = s.gate + of_keys;
  s.grad_key = s.grad_query + of_keys;
  s.grad_gate = s.grad_key + of_keys;
  s.value = s.grad_gate + of_keys;
  s.grad = s.value + of_values;
  s.products = s.grad + of_values;
  s.states = s.products + W * of_values;
  float* const states = buffers[1].of((chunks + 1) * state);  // before each chunk
  float* const grad_state = states + chunks * state;
  for (int direction = 0; direction < (t.gate_back.data ? 2 : 1); direction++) {
    const Sequence& gates = direction ? t.gate_back : t.gate;
    const auto load = [&](const Span& span) {
      gather<T>(t.key, at, span, 0, p.dim, 1.f, s.key, s.keys);
      gather<T>(t.value, at, span, 0, p.value_dim, 1.f, s.value, s.values);
      gather<float>(gates, at, span, 0, p.dim, LOG2E, s.gate, s.keys);
      for (int64_t c = 0; c < span.count * s.keys; c += W) {
        simd::store(s.gate + c, simd::exp2(simd::load(s.gate + c)));
      }
    };
    std::fill_n(states, state, 0.f);
    for (int64_t n = 0; n + 1 < chunks; n++) {
      const Span span = chunk_of(n, p.tokens, direction == 1);
      load(span);
      float* const next = states + (n + 1) * state;
      std::copy_n(states + n * state, state, next);
      each_tile(s, [&](auto columns, int64_t row, int64_t column) {
        pass_state<columns.value>(s, span.count, row, column, next);
      });
    }
    std::fill_n(grad_state, state, 0.f);
    for (int64_t n = chunks - 1; n >= 0; n--) {
      const Span span = chunk_of(n, p.tokens, direction == 1);
      load(span);
      gather<T>(t.query, at, span, 0, p.dim, 1.f, s.query, s.keys);
      const float scale = static_cast<float>(p.scale);
      gather<T>(t.grad_out, at, span, 0, p.value_dim, scale, s.grad, s.values);
      std::fill_n(s.grad_query, 3 * of_keys, 0.f);
      std::fill_n(s.products, W * of_values, 0.f);
      each_tile(s, [&](auto columns, int64_t row, int64_t column) {
        const float* const before = states + n * state;
        if (p.apart) {
          pass_gradients<columns.value, true>(s, span.count, row, column, before, grad_state);
        } else {
          pass_gradients<columns.value, false>(s, span.count, row, column, before, grad_state);
        }
      });
      for (int64_t c = 0; c < span.count * s.keys; c += W) {
        simd::store(s.grad_gate + c, simd::load(s.grad_gate + c) * simd::load(s.gate + c));
      }
      simd::sum_lanes(s.products, span.count * s.values, s.value);
      give(p, at, span, s.grad_query, s.keys, p.dim, direction, t.grad_query);
      give(p, at, span, s.grad_key, s.keys, p.dim, direction, t.grad_key);
      give(p, at, span, s.value, s.values, p.value_dim, direction, t.grad_value);
      give(p, at, span, s.grad_gate, s.keys, p.dim, false,
           direction ? t.grad_gate_back : t.grad_gate);
    }
  }
}

}  // namespace backward

// A work item is one head of one image.
template <class T>
static void differentiate(const Problem& p, const BackwardTensors& t) {
  parallel::for_each(p.batch * p.heads, p.threads, [&](int64_t index) {
    backward::differentiate<T>(p, t, {index / p.heads, index % p.heads});
  });
}

}  // namespace gated_scan
