// Gated linear attention, forward: the state is split into tiles that stay in registers for a chunk
// of tokens. Lanes are channels of the values.
#pragma once
#include "scan/problem.h"

namespace gated_scan {

struct ForwardTensors {
  Sequence query, key, value;
  Sequence gate, gate_back;  // logarithms, in float32; the second may be null
  const float* bonus;        // [heads][dim], if tokens stand apart
  void* out;                 // [batch][tokens][heads][value_dim]
};

constexpr int ROWS = 4;                                 // per tile: channels of the keys
constexpr int COLUMNS = simd::REGISTERS == 32 ? 4 : 2;  // vectors

// The arguments of a tile and a chunk. `query`, `key` and `gate` are [count][pitch], rows of
// `value` and `sum` are `value_pitch` and `sum_step` apart, `state` is [ROWS][state_pitch].
struct TileArgs {
  const float *query, *key, *gate;
  int64_t pitch;
  const float* value;
  int64_t value_pitch;
  float* sum;
  int64_t sum_step;
  float* state;
  int64_t state_pitch;
  int count;
};

template <int C, bool APART>
static void pass_tile(const TileArgs& args) {
  const TileArgs a = args;  // a copy, as stores through float pointers might alias `args`
  F state[ROWS][C];
  VB_UNROLL
  for (int r = 0; r < ROWS; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) state[r][c] = simd::load(a.state + r * a.state_pitch + c * W);
  }
  const float *query = a.query, *key = a.key, *gate = a.gate, *value = a.value;
  float* sum = a.sum;
  for (int i = 0; i < a.count; i++) {
    F v[C], out[C];
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      v[c] = simd::in_register(simd::load(value + c * W));
      out[c] = simd::load(sum + c * W);
    }
    VB_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const F q = simd::in_register(simd::set1(query[r]));
      const F k = simd::in_register(simd::set1(key[r]));
      const F decay = simd::in_register(simd::set1(gate[r]));
      VB_UNROLL
      for (int c = 0; c < C; c++) {
        if (APART) out[c] = simd::fma(q, state[r][c], out[c]);
        state[r][c] = simd::fma(state[r][c], decay, k * v[c]);
        if (!APART) out[c] = simd::fma(q, state[r][c], out[c]);
      }
    }
    VB_UNROLL
    for (int c = 0; c < C; c++) simd::store(sum + c * W, out[c]);
    query += a.pitch;
    key += a.pitch;
    gate += a.pitch;
    value += a.value_pitch;
    sum += a.sum_step;
  }
  VB_UNROLL
  for (int r = 0; r < ROWS; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) simd::store(a.state + r * a.state_pitch + c * W, state[r][c]);
  }
}

// A part of the values of one head of one image.
struct Part {
  Head head;
  int64_t begin, end;
};

// The weight of a token's own value, added to the state's contribution.
static float own_weight(const Problem& p, const float* bonus, const float* query,
                        const float* key) {
  float sum = 0.f;
  for (int64_t c = 0; c < p.dim; c++) sum += query[c] * bonus[c] * key[c];
  return sum;
}

// Both directions of a part. Sums go to `ends.finish`, token by token in the order of the last
// direction; `ends.gates` computes the gates.
template <class T, class Ends>
static void scan(const Problem& p, const Ends& ends, const Part& part) {
  static thread_local ScratchBuffer<float> buffers[3];
  const auto& t = ends.t;
  const int64_t begin = part.begin, end = part.end;
  const int64_t keys = simd::round_up(p.dim, std::max(W, ROWS));
  const int64_t values = simd::round_up(end - begin, W);
  float* const state = buffers[0].of(keys * values);
  float* const query = buffers[1].of(CHUNK * (3 * keys + values));
  float *const key = query + CHUNK * keys, *const gate = key + CHUNK * keys;
  float* const value = gate + CHUNK * keys;
  // The last direction finishes a chunk's sums immediately; only those of the first are stored.
  const bool kept = ends.directions() > 1;
  float* const sums = buffers[2].of((kept ? p.tokens : CHUNK) * values);
  const int64_t chunks = (p.tokens + CHUNK - 1) / CHUNK;
  const int64_t tiles = ((values / W + COLUMNS - 1) / COLUMNS) * ((p.dim + ROWS - 1) / ROWS);
  for (int direction = 0; direction < ends.directions(); direction++) {
    std::fill_n(state, keys * values, 0.f);
    for (int64_t n = 0; n < chunks; n++) {
      const Span span = chunk_of(n, p.tokens, direction == 1);
      gather<T>(t.query, part.head, span, 0, p.dim, static_cast<float>(p.scale), query, keys);
      gather<T>(t.key, part.head, span, 0, p.dim, 1.f, key, keys);
      gather<T>(t.value, part.head, span, begin, end, 1.f, value, values);
      ends.gates(p, direction, part.head, span, gate, keys);
      const Span next =
          n + 1 < chunks ? chunk_of(n + 1, p.tokens, direction == 1) : Span{span.first, 0, span.step};
      float* const sum = kept ? sums + span.first * values : sums;
      if (direction == 0) std::fill_n(sum, span.count * values, 0.f);
      for (int i = 0; p.apart && direction == 0 && i < span.count; i++) {
        const F own = simd::set1(own_weight(p, ends.bonus() + part.head.head * p.dim,
                                            query + i * keys, key + i * keys));
        for (int64_t c = i * values; c < (i + 1) * values; c += W) {
          simd::store(sum + c, own * simd::load(value + c));
        }
      }
      int64_t tile = 0;
      for (int64_t c = 0; c < values; c += COLUMNS * W) {
        const int vectors = static_cast<int>(std::min<int64_t>(COLUMNS, (values - c) / W));
        for (int64_t r = 0; r < p.dim; r += ROWS) {
          const TileArgs args{query + r, key + r, gate + r, keys, value + c, values, sum + c,
                              values * span.step, state + r * values + c, values, span.count};
          with_constant<COLUMNS>(vectors, [&](auto count) {
            p.apart ? pass_tile<count.value, true>(args) : pass_tile<count.value, false>(args);
          });
          // Few at a time, so that tiles don't stall: a core supports few outstanding misses.
          const Span ahead = next.share(tile++, tiles);
          fetch<T>(t.query, part.head, ahead, 0, p.dim);
          fetch<T>(t.key, part.head, ahead, 0, p.dim);
          fetch<T>(t.value, part.head, ahead, begin, end);
          ends.fetch_gates(p, direction, part.head, ahead);
          if (direction == ends.directions() - 1) {
            fetch_outputs<T>(p, t.out, part.head, ahead, begin, end);
          }
          if (kept && ahead.count) {
            memory::fetch<memory::WRITE>(sums + ahead.lowest() * values, ahead.count * values);
          }
        }
      }
      for (int i = 0; direction == ends.directions() - 1 && i < span.count; i++) {
        ends.finish(p, part, span.token(i), sum + i * span.step * values);
      }
    }
  }
}

// Scans whose `ends` need all values of a head together.
template <class T, class Ends>
static void scan_heads(const Problem& p, const Ends& ends) {
  const auto work = [&](int64_t head) {
    scan<T>(p, ends, {{head / p.heads, head % p.heads}, 0, p.value_dim});
  };
  parallel::for_each(p.batch * p.heads, p.threads, work);
}

// The plain attention.
template <class T>
struct Plain {
  const ForwardTensors& t;

  int directions() const { return t.gate_back.data ? 2 : 1; }
  const float* bonus() const { return t.bonus; }
  const Sequence& gate(int direction) const { return direction ? t.gate_back : t.gate; }

  void gates(const Problem& p, int direction, const Head& at, const Span& span, float* out,
             int64_t pitch) const {
    gather<float>(gate(direction), at, span, 0, p.dim, LOG2E, out, pitch);
    for (int64_t c = 0; c < span.count * pitch; c += W) {
      simd::store(out + c, simd::exp2(simd::load(out + c)));
    }
  }
  void fetch_gates(const Problem& p, int direction, const Head& at, const Span& span) const {
    fetch<float>(gate(direction), at, span, 0, p.dim);
  }

  void finish(const Problem& p, const Part& part, int64_t token, const float* sum) const {
    T* const out = output_row<T>(p, t.out, part.head, token);
    for (int64_t c = part.begin; c < part.end; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, part.end - c));
      simd::put(out + c, simd::load(sum + c - part.begin), lanes);
    }
  }
};

// A work item is a head, or some of its values if there are more threads than heads; the order of
// additions doesn't depend on it.
template <class T>
static void forward(const Problem& p, const ForwardTensors& t) {
  const Plain<T> plain{t};
  const int64_t heads = p.batch * p.heads;
  const int64_t blocks = (p.value_dim + COLUMNS * W - 1) / (COLUMNS * W);
  const int64_t parts = std::min(blocks, (p.threads + heads - 1) / heads);
  const auto work = [&](int64_t index) {
    const int64_t part = index % parts, head = index / parts;
    const int64_t begin = blocks * part / parts * COLUMNS * W;
    const int64_t end = std::min(p.value_dim, blocks * (part + 1) / parts * COLUMNS * W);
    scan<T>(p, plain, {{head / p.heads, head % p.heads}, begin, end});
  };
  parallel::for_each(heads * parts, p.threads, work);
}

}  // namespace gated_scan
