// Selective scan, backward: states are stored per chunk and recomputed within a chunk while
// gradients pass through it. With the gradient g of an output and those of a token's states,
// q = C g + exp(Δ' A) q' for the Δ' and q' of the next token:
//   ∂u = Δ Σ B q + D g    ∂Δ = u Σ B q + Σ A w    ∂A = Σ Δ w    ∂B = Σ Δ u q    ∂C = Σ g h
// where w = q exp(Δ A) h' for the state h' before the token. ∂B and ∂C are sums over channels.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/lane_sums.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "selective/forward.h"

namespace selective {

// Gradients are float32 and contiguous. Sums over images come apart by image, and those over
// channels by part of the blocks.
struct ChannelGrads {
  float* grad_decay;            // [batch][groups * dim][states]
  float *grad_own, *grad_bias;  // [batch][groups * dim]
};

struct SequenceGrads {
  Rows grad_out;
  float *grad_u, *grad_delta;       // [batch][groups * dim][tokens]
  float *grad_before, *grad_after;  // [parts][batch][groups][states][tokens]
};

struct MapGrads {
  const void* grad_out;   // like the map
  float* grad_in;         // [batch][tokens][dim]
  float* grad_projected;  // [parts][batch][tokens][ORDERS * numbers]
  float* grad_weight;     // [batch][ORDERS][rank][dim]
};

constexpr int PART = 128;  // channels of a work item, at most: fewer sums over channels to store

static VB_INLINE int64_t parts_of(const Problem& p) { return (p.dim + PART - 1) / PART; }

// Of a chunk and a block, [CHUNK][W] each.
struct Pieces {
  float *u, *step, *slope, *moved, *grad, *out;  // `slope`: of the softplus; `moved`: Δ u
  float *entered, *faded;                        // Σ B q and Σ A w / log2(e)
  float* decays;    // [CHUNK][STATES][W], of a tile
  float* states;    // [CHUNK + 1][STATES][W], of a tile
  float* products;  // [numbers][CHUNK][W]: summed over blocks, and later over lanes
};

// Of a block: parameters, and what is summed or carried from chunk to chunk.
struct Kept {
  float *decay, *grad_decay, *carried;  // [states][W]
  float *grad_own, *grad_bias;          // [W]
  float* grad_weight;                   // [rank][W]

  static int64_t size(const Problem& p) { return (3 * p.states + 2 + p.rank) * W; }
  static Kept at(const Problem& p, float* place) {
    const int64_t count = p.states * W;
    float* const rest = place + 3 * count;
    return {place, place + count, place + 2 * count, rest, rest + W, rest + 2 * W};
  }
};

// S states from n on: through the chunk, and back with the gradients.
template <int S, int PITCH>
static void pass_tile(const Problem& p, const Pieces& c, const Kept& kept, const Shared& shared,
                      int count, int64_t n, const float* state) {
  F rate[S], tile[S];
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    rate[s] = simd::load(kept.decay + (n + s) * W);
    tile[s] = simd::load(state + (n + s) * W);
    simd::store(c.states + s * W, tile[s]);
  }
  for (int i = 0; i < count; i++) {
    const F step = simd::load(c.step + i * W), moved = simd::load(c.moved + i * W);
    const float* const before = shared.before + i * shared.token;
    VB_UNROLL
    for (int s = 0; s < S; s++) {
      const F decay = simd::exp2(step * rate[s]);
      tile[s] = simd::fma(decay, tile[s], moved * simd::set1(before[s * PITCH]));
      simd::store(c.decays + (i * S + s) * W, decay);
      simd::store(c.states + ((i + 1) * S + s) * W, tile[s]);
    }
  }
  F grad_decay[S];
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    tile[s] = simd::load(kept.carried + (n + s) * W);  // from here on, gradients
    grad_decay[s] = simd::load(kept.grad_decay + (n + s) * W);
  }
  float* const of_before = c.products + (p.rank + n) * CHUNK * W;
  float* const of_after = of_before + p.states * CHUNK * W;
  for (int i = count - 1; i >= 0; i--) {
    const F step = simd::load(c.step + i * W), moved = simd::load(c.moved + i * W);
    const F grad = simd::load(c.grad + i * W);
    const float* const before = shared.before + i * shared.token;
    const float* const after = shared.after + i * shared.token;
    F entered = simd::load(c.entered + i * W), faded = simd::load(c.faded + i * W);
    VB_UNROLL
    for (int s = 0; s < S; s++) {
      const F q = simd::fma(simd::set1(after[s * PITCH]), grad, tile[s]);
      tile[s] = q * simd::load(c.decays + (i * S + s) * W);
      const F w = tile[s] * simd::load(c.states + (i * S + s) * W);
      entered = simd::fma(simd::set1(before[s * PITCH]), q, entered);
      faded = simd::fma(rate[s], w, faded);
      grad_decay[s] = simd::fma(step, w, grad_decay[s]);
      const int64_t at = (s * CHUNK + i) * W;
      const F seen = simd::load(c.states + ((i + 1) * S + s) * W);
      simd::store(of_before + at, simd::fma(moved, q, simd::load(of_before + at)));
      simd::store(of_after + at, simd::fma(grad, seen, simd::load(of_after + at)));
    }
    simd::store(c.entered + i * W, entered);
    simd::store(c.faded + i * W, faded);
  }
  VB_UNROLL
  for (int s = 0; s < S; s++) {
    simd::store(kept.carried + (n + s) * W, tile[s]);
    simd::store(kept.grad_decay + (n + s) * W, grad_decay[s]);
  }
}

// A part of the blocks of a source.
template <class Source>
static void differentiate(const Problem& p, const Channels& c, const ChannelGrads& grads,
                          Source source) {
  static thread_local ScratchBuffer<float> buffers[3];
  const int64_t begin = blocks_of(p) * source.part / parts_of(p);
  const int64_t blocks = blocks_of(p) * (source.part + 1) / parts_of(p) - begin;
  const int64_t of_states = p.states * W, of_chunk = CHUNK * W, of_tile = STATES * of_chunk;
  const int64_t of_products = numbers_of(p) * of_chunk;
  const int64_t chunks = (p.tokens + CHUNK - 1) / CHUNK;
  Pieces s;
  s.u = buffers[0].of(8 * of_chunk + 2 * of_tile + STATES * W + of_products + Source::scratch(p));
  s.step = s.u + of_chunk;
  s.slope = s.step + of_chunk;
  s.moved = s.slope + of_chunk;
  s.grad = s.moved + of_chunk;
  s.out = s.grad + of_chunk;
  s.entered = s.out + of_chunk;
  s.faded = s.entered + of_chunk;
  s.decays = s.faded + of_chunk;
  s.states = s.decays + of_tile;
  s.products = s.states + of_tile + STATES * W;
  source.keep(s.products + of_products);
  float* const places = buffers[1].of(blocks * Kept::size(p));
  float* const states = buffers[2].of((chunks + 1) * blocks * of_states);  // before each chunk
  for (int64_t order = 0; order < source.orders(); order++) {
    source.begin(order);
    std::fill_n(places, blocks * Kept::size(p), 0.f);
    for (int64_t index = 0; index < blocks; index++) {
      const Block b = block_of(p, source.group, begin + index);
      const Kept kept = Kept::at(p, places + index * Kept::size(p));
      load_decays(p, c, b, kept.decay);
      std::fill_n(states + index * of_states, of_states, 0.f);
      for (int64_t n = 0; n + 1 < chunks; n++) {
        const Span span = chunk_of(p, n);
        float* const state = states + (n * blocks + index) * of_states;
        const Shared shared = source.share(span);
        source.load(b, span, s.u, s.step);
        std::copy_n(state, of_states, state + blocks * of_states);
        const Moves moves{s.u, s.step, s.moved, s.out, of_block(p, b, c.bias), simd::zero()};
        advance<Source::PITCH>(p, kept.decay, moves, shared, span.count,
                               state + blocks * of_states);
      }
    }
    for (int64_t n = chunks - 1; n >= 0; n--) {
      const Span span = chunk_of(p, n);
      const Shared shared = source.share(span);
      std::fill_n(s.products, of_products, 0.f);
      for (int64_t index = 0; index < blocks; index++) {
        const Block b = block_of(p, source.group, begin + index);
        const Kept kept = Kept::at(p, places + index * Kept::size(p));
        const F bias = of_block(p, b, c.bias), own = of_block(p, b, c.own);
        source.load(b, span, s.u, s.step);
        source.load_grad(b, span, s.grad);
        for (int i = 0; i < span.count; i++) {
          const F z = simd::load(s.step + i * W) + bias;
          simd::store(s.slope + i * W, p.softplus ? activation::sigmoid(z) : simd::set1(1.f));
        }
        make_steps(p, bias, span.count, s.u, s.step, s.moved);
        std::fill_n(s.entered, 2 * of_chunk, 0.f);
        const float* const state = states + (n * blocks + index) * of_states;
        each_tile(p.states, [&](auto size, int64_t at) {
          constexpr int PITCH = Source::PITCH;
          pass_tile<size.value, PITCH>(p, s, kept, shared.from(at * PITCH), span.count, at, state);
        });
        F grad_own = simd::load(kept.grad_own), grad_bias = simd::load(kept.grad_bias);
        for (int i = 0; i < span.count; i++) {
          const int64_t at = i * W;
          const F u = simd::load(s.u + at), grad = simd::load(s.grad + at);
          const F entered = simd::load(s.entered + at);
          const F of_step = simd::fma(u, entered, simd::load(s.faded + at) * simd::set1(LN2));
          const F of_delta = simd::load(s.slope + at) * of_step;
          simd::store(s.out + at, simd::fma(simd::load(s.step + at), entered, own * grad));
          simd::store(s.slope + at, of_delta);
          grad_own = simd::fma(grad, u, grad_own);
          grad_bias = grad_bias + of_delta;
        }
        simd::store(kept.grad_own, grad_own);
        simd::store(kept.grad_bias, grad_bias);
        source.give_grads(b, span, s.out, s.slope, s.products, kept.grad_weight);
      }
      simd::sum_lanes(s.products, numbers_of(p) * CHUNK, s.products);
      source.give_sums(span, s.products);
    }
    for (int64_t index = 0; index < blocks; index++) {
      const Block b = block_of(p, source.group, begin + index);
      const Kept kept = Kept::at(p, places + index * Kept::size(p));
      const int64_t at = (source.image * p.groups + b.group) * p.dim + b.first;
      for (int l = 0; l < b.lanes; l++) {
        for (int64_t n = 0; n < p.states; n++) {
          grads.grad_decay[(at + l) * p.states + n] = kept.grad_decay[n * W + l];
        }
      }
      simd::put(grads.grad_own + at, simd::load(kept.grad_own), b.lanes);
      simd::put(grads.grad_bias + at, simd::load(kept.grad_bias), b.lanes);
      source.give_weight(b, kept.grad_weight);
    }
  }
}

template <class T>
struct SequencesBack : Sequences<T> {
  using Base = Sequences<T>;
  using Base::group, Base::image, Base::p;
  const SequenceGrads& g;
  int64_t part;

  SequencesBack(const Problem& p, const SequenceTensors& t, const SequenceGrads& g, int64_t image,
                int64_t group, int64_t part)
      : Base{p, t, image, group}, g(g), part(part) {}

  void load_grad(const Block& b, const Span& span, float* out) {
    const T* const in = Base::row(g.grad_out, b.first) + span.first;
    gather(in, g.grad_out.row, b.lanes, span.count, out);
  }
  void give_grads(const Block& b, const Span& span, const float* of_u, const float* of_delta,
                  float*, float*) {
    const int64_t at = ((image * p.groups + group) * p.dim + b.first) * p.tokens + span.first;
    scatter(of_u, b.lanes, span.count, g.grad_u + at, p.tokens);
    scatter(of_delta, b.lanes, span.count, g.grad_delta + at, p.tokens);
  }
  // `sums` are [2 * states][CHUNK].
  void give_sums(const Span& span, const float* sums) {
    const int64_t first = ((part * p.batch + image) * p.groups + group) * p.states;
    for (int64_t n = 0; n < p.states; n++) {
      const int64_t at = (first + n) * p.tokens + span.first;
      std::copy_n(sums + n * CHUNK, span.count, g.grad_before + at);
      std::copy_n(sums + (p.states + n) * CHUNK, span.count, g.grad_after + at);
    }
  }
  void give_weight(const Block&, const float*) {}
};

template <class T>
struct MapBack : Map<T> {
  using Base = Map<T>;
  using Base::group, Base::image, Base::numbers, Base::p, Base::pixels, Base::t;
  const MapGrads& g;
  int64_t part;

  MapBack(const Problem& p, const MapTensors& t, const MapGrads& g, int64_t image, int64_t part)
      : Base{p, t, image}, g(g), part(part) {}

  void load_grad(const Block& b, const Span& span, float* out) {
    const T* const in = static_cast<const T*>(g.grad_out) + image * p.tokens * p.dim + b.first;
    for (int i = 0; i < span.count; i++) {
      simd::store(out + i * W, simd::get(in + pixels[i] * p.dim, b.lanes));
    }
  }
  void give_grads(const Block& b, const Span& span, const float* of_in, const float* of_delta,
                  float* products, float* of_weight) {
    float* const out = g.grad_in + image * p.tokens * p.dim + b.first;
    for (int i = 0; i < span.count; i++) {
      float* const at = out + pixels[i] * p.dim;
      const F x = simd::load(of_in + i * W);
      simd::put(at, group ? x + simd::get(at, b.lanes) : x, b.lanes);
    }
    const float* const weight = t.weight + group * p.rank * p.dim + b.first;
    const int64_t pitch = Base::pitch(p);
    for (int64_t r = 0; r < p.rank; r++) {
      const F w = simd::get(weight + r * p.dim, b.lanes);
      F sum = simd::load(of_weight + r * W);
      for (int i = 0; i < span.count; i++) {
        const F grad = simd::load(of_delta + i * W);
        float* const product = products + (r * CHUNK + i) * W;
        sum = simd::fma(simd::set1(numbers[i * pitch + r]), grad, sum);
        simd::store(product, simd::fma(w, grad, simd::load(product)));
      }
      simd::store(of_weight + r * W, sum);
    }
  }
  // `sums` are [numbers][CHUNK].
  void give_sums(const Span& span, const float* sums) {
    const int64_t count = numbers_of(p), first = (part * p.batch + image) * p.tokens;
    for (int i = 0; i < span.count; i++) {
      float* const out = g.grad_projected + ((first + pixels[i]) * ORDERS + group) * count;
      for (int64_t c = 0; c < count; c++) out[c] = sums[c * CHUNK + i];
    }
  }
  void give_weight(const Block& b, const float* of_weight) {
    float* const out =
        g.grad_weight + (image * ORDERS + group) * p.rank * p.dim + b.first;
    for (int64_t r = 0; r < p.rank; r++) {
      simd::put(out + r * p.dim, simd::load(of_weight + r * W), b.lanes);
    }
  }
};

template <class T>
static void differentiate(const Problem& p, const Channels& c, const ChannelGrads& grads,
                          const SequenceTensors& t, const SequenceGrads& g) {
  const int64_t parts = parts_of(p);
  parallel::for_each(p.batch * p.groups * parts, p.threads, [&](int64_t item) {
    const int64_t group = item / parts;
    differentiate(
        p, c, grads,
        SequencesBack<T>(p, t, g, group / p.groups, group % p.groups, item % parts));
  });
}

template <class T>
static void differentiate(const Problem& p, const Channels& c, const ChannelGrads& grads,
                          const MapTensors& t, const MapGrads& g) {
  const int64_t parts = parts_of(p);
  parallel::for_each(p.batch * parts, p.threads, [&](int64_t item) {
    differentiate(p, c, grads, MapBack<T>(p, t, g, item / parts, item % parts));
  });
}

}  // namespace selective
