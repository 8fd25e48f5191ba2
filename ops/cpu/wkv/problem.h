// Bi-WKV along a sequence: the parameters of a call, and its division among threads.
#pragma once
#include "wkv/sums.h"

namespace wkv {

// bi_wkv.py fills in these fields.
struct Problem {
  int64_t batch, tokens, dim;
  int64_t length;  // tokens per segment; 0 for the formula
  int64_t bfloat16, threads;
};

// Weights that depend only on the channel, in the representation P. If begin is the first token of
// t's segment, the weight of token i for t, before its key, is the sum of
//   step λ^(|t - i| - 1), or own if i = t;
//   nearer · factor · λ^(t - i - 1) if begin <= i < t;
//   -farther · factor · μ^(t - i) if begin < i <= t.
template <class P>
struct Channel {
  using V = typename P::V;
  typename P::Decay lambda, mu;
  V step, own, nearer, farther;
  V factor;                          // nearer · factor is 1 - λ, farther · factor is μ - 1
  V nearer_slope, farther_slope;     // nearer · slope is λ, farther · slope is μ
  V steps;                           // the value of `step`, 0 or 1
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

// Whether factors neither overflow nor vanish next to others for any keys; otherwise exponents are
// used. Decays of networks, a few units over all tokens, are far from these limits.
static bool are_mild(const float* decay, const float* first, int lanes, int64_t tokens) {
  constexpr float MOST = 20.f;
  const float count = static_cast<float>(tokens);
  for (int l = 0; l < lanes; l++) {
    if (!(std::abs(decay[l]) * count <= MOST && std::abs(first[l]) <= MOST)) return false;
  }
  return true;
}

// Calls mild(image, channel, lanes) for several channels of an image at once, or
// wild(image, channel) for a single one.
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
