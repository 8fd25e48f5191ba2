// Selective scan, forward: lanes are channels, and their states stay in registers for a chunk.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/parallel.h"
#include "common/scratch.h"
#include "selective/map.h"
#include "selective/sequences.h"

namespace selective {

// What a chunk's tokens move into the states of a block, [CHUNK][W] each.
struct Moves {
  const float* u;
  float *step, *moved;  // of make_steps; `step` is delta before it
  float* out;
  F bias, own;  // of the steps; D
};

// Advances S states by a chunk and adds what is seen of them to `out`.
template <int S, int PITCH>
static void advance_tile(const float* decay, const Moves& m, const Shared& shared, int count,
                         float* state) {
  F rate[S], h[S];
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    rate[s] = simd::load(decay + s * W);
    h[s] = simd::load(state + s * W);
  }
  const float *before = shared.before, *after = shared.after;
  for (int i = 0; i < count; i++) {
    const F d = simd::load(m.step + i * W), x = simd::load(m.moved + i * W);
    F sum = simd::load(m.out + i * W);
    F faded[S];
    VB_UNROLL
    for (int s = 0; s < S; s++) faded[s] = d * rate[s];
    simd::exp2(faded);
    VB_UNROLL
    for (int s = 0; s < S; s++) {
      h[s] = simd::fma(faded[s], h[s], x * simd::set1(before[s * PITCH]));
      sum = simd::fma(h[s], simd::set1(after[s * PITCH]), sum);
    }
    simd::store(m.out + i * W, sum);
    before += shared.token;
    after += shared.token;
  }
  VB_UNROLL
  for (int s = 0; s < S; s++) simd::store(state + s * W, h[s]);
}

// Makes the steps of a chunk and advances the only state by it, without storing the steps.
static void advance_one(const Problem& p, const float* decay, const Moves& m, const Shared& shared,
                        int count, float* state) {
  const F rate = simd::load(decay);
  F h = simd::load(state);
  for (int first = 0; first < count; first += AT_ONCE) {
    F step[AT_ONCE], x[AT_ONCE];
    load_steps(p, m.bias, m.step + first * W, step);
    VB_UNROLL
    for (int i = 0; i < AT_ONCE; i++) {
      x[i] = step[i] * simd::load(m.u + (first + i) * W);
      step[i] = step[i] * rate;
    }
    simd::exp2(step);
    const int here = std::min(AT_ONCE, count - first);
    const auto pass = [&](int i) VB_INLINE_LAMBDA {
      const int64_t at = first + i;
      h = simd::fma(step[i], h, x[i] * simd::set1(shared.before[at * shared.token]));
      const F own = m.own * simd::load(m.u + at * W);
      simd::store(m.out + at * W, simd::fma(h, simd::set1(shared.after[at * shared.token]), own));
    };
    if (here == AT_ONCE) {
      VB_UNROLL
      for (int i = 0; i < AT_ONCE; i++) pass(i);
    } else {
      for (int i = 0; i < here; i++) pass(i);
    }
  }
  simd::store(state, h);
}

// Makes the steps of a chunk and advances all states by it.
template <int PITCH>
static void advance(const Problem& p, const float* decay, const Moves& m, const Shared& shared,
                    int count, float* state) {
  if (p.states == 1) return advance_one(p, decay, m, shared, count, state);
  make_steps(p, m.bias, count, m.u, m.step, m.moved);
  for (int i = 0; i < count; i++) simd::store(m.out + i * W, m.own * simd::load(m.u + i * W));
  each_tile(p.states, [&](auto size, int64_t n) {
    advance_tile<size.value, PITCH>(decay + n * W, m, shared.from(n * PITCH), count, state + n * W);
  });
}

// Neighbouring blocks of channels in the orders of a source, one after the other.
template <class Source>
static void scan(const Problem& p, const Channels& c, Source source, const Strip& strip) {
  static thread_local ScratchBuffer<float> buffer;
  const int64_t of_states = p.states * W, of_chunk = CHUNK * W;
  float* const states = buffer.of(2 * strip.blocks * of_states + 4 * of_chunk + Source::scratch(p));
  float* const decays = states + strip.blocks * of_states;
  float* const u = decays + strip.blocks * of_states;
  float *const step = u + of_chunk, *const moved = step + of_chunk, *const out = moved + of_chunk;
  source.keep(out + of_chunk);
  for (int64_t order = 0; order < source.orders(); order++) {
    source.begin(order);
    std::fill_n(states, strip.blocks * of_states, 0.f);
    for (int64_t k = 0; k < strip.blocks; k++) {
      load_decays(p, c, block_of(p, source.group, strip.first + k), decays + k * of_states);
    }
    for (int64_t n = 0; n * CHUNK < p.tokens; n++) {
      const Span span = chunk_of(p, n);
      const Shared shared = source.share(span);
      for (int64_t k = 0; k < strip.blocks; k++) {
        const Block b = block_of(p, source.group, strip.first + k);
        source.load(b, span, u, step);
        const Moves moves{u, step, moved, out, of_block(p, b, c.bias), of_block(p, b, c.own)};
        advance<Source::PITCH>(p, decays + k * of_states, moves, shared, span.count,
                               states + k * of_states);
        source.give(b, span, strip, out);
      }
    }
  }
  source.end(strip);
}

// Calls work(source, strip) for the strips of `sources` groups of blocks.
template <class Source, class Work>
static void each_strip(const Problem& p, int64_t sources, const Work& work) {
  const int64_t blocks = blocks_of(p);
  // As few as a strip's length and the threads allow.
  const int64_t enough = (p.threads + sources - 1) / sources;
  const int64_t least = (blocks + Source::STRIP - 1) / Source::STRIP;
  const int64_t strips = std::clamp(enough, least, blocks);
  parallel::for_each(sources * strips, p.threads, [&](int64_t item) {
    const int64_t at = item % strips, first = at * blocks / strips;
    work(item / strips, Strip{first, (at + 1) * blocks / strips - first});
  });
}

template <class T>
static void forward(const Problem& p, const Channels& c, const SequenceTensors& t) {
  each_strip<Sequences<T>>(p, p.batch * p.groups, [&](int64_t group, const Strip& strip) {
    scan(p, c, Sequences<T>{p, t, group / p.groups, group % p.groups}, strip);
  });
}

template <class T>
static void forward(const Problem& p, const Channels& c, const MapTensors& t) {
  each_strip<Map<T>>(p, p.batch, [&](int64_t image, const Strip& strip) {
    scan(p, c, Map<T>{p, t, image}, strip);
  });
}

}  // namespace selective
