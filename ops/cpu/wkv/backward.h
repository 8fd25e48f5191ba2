// The gradients of forward.h. The passes are those of forward.h, followed by the same sums over the
// tokens whose outputs a token contributes to.
#pragma once
#include "wkv/forward.h"

namespace wkv {

// As in the forward pass; `grad_decay` and `grad_first` are [batch][dim].
struct GradTensors {
  const float* key;
  const float* value;
  const float* decay;
  const float* first;
  const float* grad_out;
  float* grad_key;
  float* grad_value;
  float* grad_decay;
  float* grad_first;
};

// Sums of numbers, and of numbers times their distances.
template <class P>
struct Distant {
  using V = typename P::V;
  typename P::template Sums<4> all = P::template Sums<4>::none();

  VB_INLINE void fade(const typename P::Decay& decay) {
    for (int n = 0; n < 2; n++) all.sum[2 + n] = all.sum[2 + n] + all.sum[n];
    all.fade(decay);
  }
  VB_INLINE void add(V weight, const V (&x)[2]) {
    all.add(weight, {x[0], x[1], P::same(0.f), P::same(0.f)});
  }
  // The sums times a factor, and their derivative with respect to the decay: times `slope`, minus
  // or plus the distance.
  VB_INLINE typename P::template Sums<4> derived(V factor, V slope, V distance) const {
    const V(&s)[4] = all.sum;
    return all.with({factor * s[0], factor * s[1], slope * s[0] + distance * s[2],
                     slope * s[1] + distance * s[3]});
  }
};

// Stored per token: its weight and the sums over later tokens; for its output, a weight, the
// gradient of a value per unit of weight, and the extra gradient of the weight; and sums of these.
template <class P>
struct NotedGrad {
  typename P::V weight;
  Distant<P> after;
  typename P::V inverse, by_value, by_weight;
  typename P::template Sums<2> earlier;
};

template <class P>
static void backward(const Problem& p, const GradTensors& tensors, int64_t image,
                     int64_t first_channel, int lanes) {
  using V = typename P::V;
  using Sums = typename P::template Sums<2>;
  const int64_t offset = image * p.tokens * p.dim + first_channel, dim = p.dim, tokens = p.tokens;
  const float* key = tensors.key + offset;
  const float* value = tensors.value + offset;
  const float* grad_out = tensors.grad_out + offset;
  const auto c = channel_of<P>(tensors.decay + first_channel, tensors.first + first_channel, lanes,
                               p.length > 0);
  static thread_local ScratchBuffer<NotedGrad<P>> buffer;
  NotedGrad<P>* const noted = buffer.of(tokens);
  weigh<P>(key, tokens, dim, lanes, noted);

  const V zero = P::same(0.f), one = P::same(1.f), minus = P::same(-1.f);
  Distant<P> sums;
  for (int64_t t = tokens - 1; t >= 0; t--) {
    noted[t].after = sums;
    sums.fade(c.lambda);
    sums.add(noted[t].weight, {P::get(value + t * dim, lanes), one});
  }
  Distant<P> before, nearer, farther;
  V grad_decay = zero, grad_first = zero;
  int64_t place = 0;
  for (int64_t t = 0; t < tokens; t++) {
    const V own[2] = {P::get(value + t * dim, lanes), one};
    const V own_weight = P::times(noted[t].weight, c.own);
    auto all = P::template Sums<4>::none();
    all.add(own_weight, {own[0], one, zero, zero});
    all.add(c.step, one, before.derived(one, minus * c.steps, minus));
    all.add(c.step, one, noted[t].after.derived(one, minus * c.steps, minus));
    before.fade(c.lambda);
    before.add(noted[t].weight, own);
    if (p.length > 1) {
      if (place == p.length) {
        place = 0;
        nearer = farther = Distant<P>();
      }
      if (place) {
        farther.fade(c.mu);
        farther.add(noted[t].weight, own);
        all.add(c.nearer, one, nearer.derived(c.factor, c.nearer_slope, minus * c.factor));
        all.add(c.farther, minus, farther.derived(c.factor, c.farther_slope, c.factor));
      }
      nearer.fade(c.lambda);
      nearer.add(noted[t].weight, own);
      place++;
    }
    const V out = all.sum[0] / all.sum[1];
    const V grad = P::get(grad_out + t * dim, lanes) / all.sum[1];
    grad_decay = grad_decay + grad * (all.sum[2] - out * all.sum[3]);
    grad_first = grad_first + grad * all.share(own_weight) * (own[0] - out);
    noted[t].inverse = all.inverse();
    noted[t].by_value = grad;
    noted[t].by_weight = minus * grad * out;
  }
  P::put(tensors.grad_decay + image * dim + first_channel, grad_decay, lanes);
  P::put(tensors.grad_first + image * dim + first_channel, grad_first, lanes);

  Sums of_earlier = Sums::none();
  for (int64_t i = 0; i < tokens; i++) {
    noted[i].earlier = of_earlier;
    of_earlier.fade(c.lambda);
    of_earlier.add(noted[i].inverse, {noted[i].by_value, noted[i].by_weight});
  }
  Sums of_later = Sums::none(), of_nearer = Sums::none(), of_farther = Sums::none();
  for (int64_t i = tokens - 1; i >= 0; i--) {
    const V inverse = noted[i].inverse, own[2] = {noted[i].by_value, noted[i].by_weight};
    Sums all = Sums::none();
    all.add(P::times(inverse, c.own), own);
    all.add(c.step, one, noted[i].earlier);
    all.add(c.step, one, of_later);
    of_later.fade(c.lambda);
    of_later.add(inverse, own);
    if (p.length > 1) {
      if (i % p.length == p.length - 1) of_nearer = of_farther = Sums::none();
      all.add(c.nearer, c.factor, of_nearer);
      of_nearer.fade(c.lambda);
      of_nearer.add(inverse, own);
      of_farther.fade(c.mu);
      of_farther.add(inverse, own);
      if (i % p.length) all.add(c.farther, minus * c.factor, of_farther);
    }
    const V grad = all.scaled(noted[i].weight, 0);
    const V besides = all.scaled(noted[i].weight, 1);
    P::put(tensors.grad_value + offset + i * dim, grad, lanes);
    const V v = P::get(value + i * dim, lanes);
    P::put(tensors.grad_key + offset + i * dim, grad * v + besides, lanes);
  }
}

static void backward(const Problem& p, const GradTensors& t) {
  const auto mild = [&](int64_t image, int64_t channel, int lanes) {
    backward<Factors>(p, t, image, channel, lanes);
  };
  const auto wild = [&](int64_t image, int64_t channel) {
    backward<Exponents>(p, t, image, channel, 1);
  };
  for_each_block(p, t.decay, t.first, mild, wild);
}

}  // namespace wkv
