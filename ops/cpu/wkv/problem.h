// Bi-WKV along a sequence: what a call is given, and how it is shared out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include "common/parallel.h"
#include "common/simd.h"
#include "wkv/sums.h"

namespace wkv {

// bi_wkv.py reads the fields from here.
struct Problem {
  int64_t batch, tokens, dim;
  int64_t length;  // tokens of a segment; 0 for the formula
  int64_t bfloat16, threads;
};

// Weights that depend on the channel alone, as P has them. Where begin is the first token of t's
// segment, token i weighs for t, before its key:
//   step λ^(|t - i| - 1), and own where i = t;
//   besides, nearer · factor · λ^(t - i - 1) where begin <= i < t,
//   minus farther · factor · μ^(t - i) where begin < i <= t.
template <class P>
struct Channel {
  using V = typename P::V;
  typename P::Decay lambda, mu;
  V step, own, nearer, farther;
  V factor;                          // nearer · factor is 1 - λ, farther · factor is μ - 1
  V nearer_slope, farther_slope;     // nearer · slope is λ, farther · slope is μ
  V steps;                           // that `step` is, 0 or 1
};

template <class P>
static Channel<P> channel_of(const float* decay, const float* first, int lanes, bool segments) {
  double w[P::LANES] = {}, u[P::LANES] = {}, up[P::LANES], factor[P::LANES];
  double nearer[P::LANES], nearer_slope[P::LANES], farther_slope[P::LANES], minus[P::LANES];
  for (int l = 0; l < lanes; l++) w[l] = decay[l], u[l] = first[l];
  for (int l = 0; l < P::LANES; l++) {
    minus[l] = -w[l];
    up[l] = std::max(w[l], 0.0);
    nearer[l] = up[l] - w[l];
    factor[l] = w[l] > 0 ? -std::expm1(-w[l]) : std::expm1(w[l]);
    nearer_slope[l] = w[l] > 0 ? std::exp(-w[l]) : 1.0;
    farther_slope[l] = w[l] > 0 ? 1.0 : std::exp(w[l]);
  }
  const double none[P::LANES] = {};
  return {P::decay(minus),
          P::decay(w),
          P::weight(segments ? minus : none),
          P::weight(u),
          P::weight(nearer),
          P::weight(up),
          P::number(factor),
          P::number(nearer_slope),
          P::number(farther_slope),
          P::same(segments ? 1.f : 0.f)};
}

// Whether factors neither overflow nor vanish beside others, whatever the keys are: else exponents
// are kept. Decays of networks, a few units over all tokens, are far from that.
static bool are_mild(const float* decay, const float* first, int lanes, int64_t tokens) {
  constexpr float MOST = 20.f;
  const float count = static_cast<float>(tokens);
  for (int l = 0; l < lanes; l++) {
    if (!(std::abs(decay[l]) * count <= MOST && std::abs(first[l]) <= MOST)) return false;
  }
  return true;
}

// Calls mild(image, channel, lanes) for some channels of an image at once, or else
// wild(image, channel) for one.
template <class Mild, class Wild>
static void for_each_block(const Problem& p, const float* decay, const float* first,
                           const Mild& mild, const Wild& wild) {
  const int64_t blocks = (p.dim + W - 1) / W;
  const auto work = [&](int64_t task) {
    const int64_t image = task / blocks, channel = task % blocks * W;
    const int lanes = static_cast<int>(std::min<int64_t>(W, p.dim - channel));
    if (are_mild(decay + channel, first + channel, lanes, p.tokens)) {
      return mild(image, channel, lanes);
    }
    for (int l = 0; l < lanes; l++) wild(image, channel + l);
  };
  parallel::for_each(p.batch * blocks, p.threads, work);
}

}  // namespace wkv
