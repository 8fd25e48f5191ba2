// Selective scan, forward: lanes are channels, and their states stay in registers for a chunk.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/parallel.h"
#include "common/scratch.h"
#include "selective/map.h"
#include "selective/sequences.h"

namespace selective {

// Advances S states by a chunk and adds what is seen of them to `out`.
template <int S, int PITCH>
static void advance_tile(const float* decay, const float* step, const float* moved, const Shared& shared,
                    int count, float* state, float* out) {
  F rate[S], h[S];
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    rate[s] = simd::load(decay + s * W);
    h[s] = simd::load(state + s * W);
  }
  const float *before = shared.before, *after = shared.after;
  for (int i = 0; i < count; i++) {
    const F d = simd::load(step + i * W), x = simd::load(moved + i * W);
    F sum = simd::load(out + i * W);
    VB_UNROLL
    for (int s = 0; s < S; s++) {
      h[s] = simd::fma(simd::exp2(d * rate[s]), h[s], x * simd::set1(before[s * PITCH]));
      sum = simd::fma(h[s], simd::set1(after[s * PITCH]), sum);
    }
    simd::store(out + i * W, sum);
    before += shared.token;
    after += shared.token;
  }
  VB_UNROLL
  for (int s = 0; s < S; s++) simd::store(state + s * W, h[s]);
}

// The same for all states.
template <int PITCH>
static void advance(const Problem& p, const float* decay, const float* step, const float* moved,
                    const Shared& shared, int count, float* state, float* out) {
  each_tile(p.states, [&](auto size, int64_t n) {
    advance_tile<size.value, PITCH>(decay + n * W, step, moved, shared.from(n * PITCH), count,
                                    state + n * W, out);
  });
}

// A block of channels in the orders of a source, one after the other.
template <class Source>
static void scan(const Problem& p, const Channels& c, Source source, int64_t index) {
  static thread_local ScratchBuffer<float> buffer;
  const int64_t of_states = p.states * W, of_chunk = CHUNK * W;
  float* const state = buffer.of(2 * of_states + 4 * of_chunk + Source::scratch(p));
  float *const decay = state + of_states, *const u = decay + of_states;
  float *const step = u + of_chunk, *const moved = step + of_chunk, *const out = moved + of_chunk;
  source.keep(out + of_chunk);
  for (int64_t order = 0; order < source.orders(); order++) {
    source.begin(order);
    const Block b = block_of(p, source.group, index);
    load_decays(p, c, b, decay);
    const F bias = of_block(p, b, c.bias), own = of_block(p, b, c.own);
    std::fill_n(state, of_states, 0.f);
    for (int64_t n = 0; n * CHUNK < p.tokens; n++) {
      const Span span = chunk_of(p, n);
      const Shared shared = source.load(b, span, u, step);
      make_steps(p, bias, span.count, u, step, moved);
      for (int i = 0; i < span.count; i++) simd::store(out + i * W, simd::load(u + i * W) * own);
      advance<Source::PITCH>(p, decay, step, moved, shared, span.count, state, out);
      source.give(b, span, out);
    }
  }
  source.end(index);
}

template <class T>
static void forward(const Problem& p, const Channels& c, const SequenceTensors& t) {
  const int64_t blocks = blocks_of(p);
  parallel::for_each(p.batch * p.groups * blocks, p.threads, [&](int64_t item) {
    const int64_t group = item / blocks;
    scan(p, c, Sequences<T>{p, t, group / p.groups, group % p.groups}, item % blocks);
  });
}

template <class T>
static void forward(const Problem& p, const Channels& c, const MapTensors& t) {
  const int64_t blocks = blocks_of(p);
  parallel::for_each(p.batch * blocks, p.threads, [&](int64_t item) {
    scan(p, c, Map<T>{p, t, item / blocks}, item % blocks);
  });
}

}  // namespace selective
