// Selective scan: the parameters of a call, its chunks, and the steps of tokens.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/activation.h"
#include "common/lanes.h"
#include "common/prefetch.h"
#include "common/simd.h"

namespace selective {

using simd::F;
using simd::W;

// selective_scan.py fills in the fields of these structures. A map has four groups, one per order.
struct Problem {
  int64_t batch, tokens, groups;
  int64_t dim;  // channels of a group
  int64_t states;
  int64_t height, width, rank;  // of a map
  int64_t softplus, bfloat16, threads;
};

// Parameters of all groups' channels; the last two may be null.
struct Channels {
  const float* decay;  // A: [groups * dim][states]
  const float* own;    // D
  const float* bias;   // of the steps
};

constexpr int CHUNK = 16;                                 // tokens at a time, a multiple of W
constexpr int STATES = simd::REGISTERS == 32 ? 8 : 4;  // of W channels in registers at a time
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// W neighbouring channels of a group, or fewer at its end: the lanes of all vectors.
struct Block {
  int64_t group, first;  // channel in the group
  int lanes;
};

// Neighbouring blocks of a group.
struct Strip {
  int64_t first, blocks;
};

// Numbers of a token that all channels share: of its step, B and C.
static VB_INLINE int64_t numbers_of(const Problem& p) { return p.rank + 2 * p.states; }

static VB_INLINE int64_t blocks_of(const Problem& p) { return (p.dim + W - 1) / W; }

static VB_INLINE Block block_of(const Problem& p, int64_t group, int64_t index) {
  return {group, index * W, static_cast<int>(std::min<int64_t>(W, p.dim - index * W))};
}

static VB_INLINE F of_block(const Problem& p, const Block& b, const float* in) {
  return in ? simd::get(in + b.group * p.dim + b.first, b.lanes) : simd::zero();
}

// A of a block, times log2(e): [states][W].
static void load_decays(const Problem& p, const Channels& c, const Block& b, float* out) {
  std::fill_n(out, p.states * W, 0.f);
  const float* const in = c.decay + (b.group * p.dim + b.first) * p.states;
  for (int l = 0; l < b.lanes; l++) {
    for (int64_t n = 0; n < p.states; n++) out[n * W + l] = in[l * p.states + n] * LOG2E;
  }
}

// Consecutive tokens of a sequence.
struct Span {
  int64_t first;
  int count;
};

static VB_INLINE Span chunk_of(const Problem& p, int64_t index) {
  const int64_t first = index * CHUNK;
  return {first, static_cast<int>(std::clamp<int64_t>(p.tokens - first, 0, CHUNK))};
}

// log(1 + exp(z)) with a relative error of a few ulp: a minimax polynomial of log(1 + e) / e for e
// in 0 … 1. Vectors step by step, see simd::exp2.
template <int N>
static VB_INLINE void softplus(F (&z)[N]) {
  constexpr float TERMS[] = {5.2326941098e-3f,  -2.9505237276e-2f, 7.8225947817e-2f,
                             -1.3663245296e-1f, 1.9106006444e-1f,  -2.4842982110e-1f,
                             3.3319096792e-1f,  -4.9999493140e-1f, 1.f};
  F above[N], e[N];
  VB_UNROLL
  for (int i = 0; i < N; i++) above[i] = activation::positive(z[i]);
  VB_UNROLL
  for (int i = 0; i < N; i++) {  // the exponents of -|z|
    e[i] = simd::fma(above[i], simd::set1(-2 * LOG2E), z[i] * simd::set1(LOG2E));
    z[i] = simd::set1(TERMS[0]);
  }
  simd::exp2(e);
  VB_UNROLL
  for (int t = 1; t < 9; t++) {
    VB_UNROLL
    for (int i = 0; i < N; i++) z[i] = simd::fma(z[i], e[i], simd::set1(TERMS[t]));
  }
  VB_UNROLL
  for (int i = 0; i < N; i++) z[i] = simd::fma(e[i], z[i], above[i]);
}

constexpr int AT_ONCE = 4;  // tokens whose exponentials are computed together

// The steps of tokens from their deltas.
static VB_INLINE void load_steps(const Problem& p, F bias, const float* delta,
                                 F (&step)[AT_ONCE]) {
  VB_UNROLL
  for (int i = 0; i < AT_ONCE; i++) step[i] = simd::load(delta + i * W) + bias;
  if (p.softplus) softplus(step);
}

// Makes steps of a chunk's delta, in place, and their products with u; also beyond `count`.
static VB_INLINE void make_steps(const Problem& p, F bias, int count, const float* u, float* delta,
                                 float* moved) {
  for (int i = 0; i < count; i += AT_ONCE) {
    F step[AT_ONCE];
    load_steps(p, bias, delta + i * W, step);
    VB_UNROLL
    for (int j = 0; j < AT_ONCE; j++) {
      simd::store(delta + (i + j) * W, step[j]);
      simd::store(moved + (i + j) * W, simd::load(u + (i + j) * W) * step[j]);
    }
  }
}

// Numbers of B and C, which all lanes share: that of the i-th token and state n is at
// i * token + n * PITCH.
struct Shared {
  const float *before, *after;
  int64_t token;

  Shared from(int64_t place) const { return {before + place, after + place, token}; }
};

// Calls work(std::integral_constant<int, S>, n) for every S states from n on.
template <int S = STATES, class Work>
static VB_INLINE void each_tile(int64_t states, const Work& work, int64_t n = 0) {
  for (; n + S <= states; n += S) work(std::integral_constant<int, S>(), n);
  if constexpr (S > 1) {
    if (n < states) each_tile<S / 2>(states, work, n);
  }
}

}  // namespace selective
