// Selective scan, forward: lanes are channels, and their states stay in registers for a chunk.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/parallel.h"
#include "common/scratch.h"
#include "selective/map.h"
#include "selective/sequences.h"

namespace selective {

// A chunk of a block, [CHUNK][W] each: from u and delta to the output.
struct Chunk {
  float *u, *delta;  // steps take the place of delta
  float *moved;      // steps times u
  float *out;
};

// Advances S states by a chunk and adds what is seen of them to the output. The FIRST ones make the
// steps, which are stored unless they are the ONLY ones.
template <int S, int PITCH, bool FIRST, bool ONLY>
static void advance_tile(const Problem& p, const Chunk& chunk, const float* decay,
                         const Shared& shared, int count, F bias, F own, float* state) {
  const Chunk c = chunk;  // a copy, as stores through float pointers might alias it
  const bool softened = p.softplus;
  F rate[S], h[S];
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    rate[s] = simd::load(decay + s * W);
    h[s] = simd::load(state + s * W);
  }
  const float *before = shared.before, *after = shared.after;
  for (int i = 0; i < count * W; i += W) {
    F step = simd::load(c.delta + i), moved, sum;
    if (FIRST) {
      const F u = simd::load(c.u + i);
      step = step + bias;
      if (softened) step = softplus(step);
      moved = u * step;
      sum = u * own;
      if (!ONLY) {
        simd::store(c.delta + i, step);
        simd::store(c.moved + i, moved);
      }
    } else {
      moved = simd::load(c.moved + i);
      sum = simd::load(c.out + i);
    }
    VB_UNROLL
    for (int s = 0; s < S; s++) {
      h[s] = simd::fma(simd::exp2(step * rate[s]), h[s], moved * simd::set1(before[s * PITCH]));
      sum = simd::fma(h[s], simd::set1(after[s * PITCH]), sum);
    }
    simd::store(c.out + i, sum);
    before += shared.token;
    after += shared.token;
  }
  VB_UNROLL
  for (int s = 0; s < S; s++) simd::store(state + s * W, h[s]);
}

// The same for all states.
template <int PITCH>
static void advance(const Problem& p, const Chunk& c, const float* decay, const Shared& shared,
                    int count, F bias, F own, float* state) {
  each_tile(p.states, [&](auto size, int64_t n) {
    constexpr int S = size.value;
    const auto pass = n ? advance_tile<S, PITCH, false, false>
                        : n + S == p.states ? advance_tile<S, PITCH, true, true>
                                            : advance_tile<S, PITCH, true, false>;
    pass(p, c, decay + n * W, shared.from(n * PITCH), count, bias, own, state + n * W);
  });
}

// A block of channels in the orders of a source, one after the other.
template <class Source>
static void scan(const Problem& p, const Channels& c, Source source, int64_t index) {
  static thread_local ScratchBuffer<float> buffer;
  const int64_t of_states = p.states * W, of_chunk = CHUNK * W;
  float* const state = buffer.of(2 * of_states + 4 * of_chunk + Source::scratch(p));
  float *const decay = state + of_states, *const u = decay + of_states;
  const Chunk chunk{u, u + of_chunk, u + 2 * of_chunk, u + 3 * of_chunk};
  source.keep(u + 4 * of_chunk);
  for (int64_t order = 0; order < source.orders(); order++) {
    source.begin(order);
    const Block b = block_of(p, source.group, index);
    load_decays(p, c, b, decay);
    const F bias = of_block(p, b, c.bias), own = of_block(p, b, c.own);
    std::fill_n(state, of_states, 0.f);
    for (int64_t n = 0; n * CHUNK < p.tokens; n++) {
      const Span span = chunk_of(p, n);
      const Shared shared = source.load(b, span, chunk.u, chunk.delta);
      source.fetch(b, chunk_of(p, n + 1));
      advance<Source::PITCH>(p, chunk, decay, shared, span.count, bias, own, state);
      source.give(b, span, chunk.out);
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
