// Bi-WKV, a block of channels at a time: backward along the sequence, for sums over later tokens,
// then forward.
#pragma once
#include "wkv/problem.h"

namespace wkv {

// `key`, `value`, `out` and the optional `gate` are [batch][tokens][dim]; `decay` and `first`
// [dim]. The result is multiplied by the gate's sigmoid.
struct Tensors {
  const void* key;
  const void* value;
  const void* gate;
  const float* decay;
  const float* first;
  void* out;
};

// Stored per token: the weight of its key, and the sums over later tokens.
template <class P>
struct Noted {
  typename P::V weight;
  typename P::template Sums<2> after;
};

// Computes the weights of all keys, `stride` apart.
template <class P, class T, class Token>
static VB_INLINE void weigh(const T* key, int64_t tokens, int64_t stride, int lanes, Token* noted) {
  auto greatest = P::get(key, lanes);
  for (int64_t t = 1; t < tokens; t++) {
    greatest = P::greater(P::get(key + t * stride, lanes), greatest);
  }
  for (int64_t t = 0; t < tokens; t++) {
    noted[t].weight = P::weight_of(P::get(key + t * stride, lanes), greatest);
  }
}

template <class P, class T>
static void forward(const Problem& p, const Tensors& tensors, int64_t image, int64_t first_channel,
                    int lanes) {
  using V = typename P::V;
  using Sums = typename P::template Sums<2>;
  const int64_t offset = image * p.tokens * p.dim + first_channel, dim = p.dim;
  const T* key = static_cast<const T*>(tensors.key) + offset;
  const T* value = static_cast<const T*>(tensors.value) + offset;
  const T* gate = tensors.gate ? static_cast<const T*>(tensors.gate) + offset : nullptr;
  T* out = static_cast<T*>(tensors.out) + offset;
  const auto c = channel_of<P>(tensors.decay + first_channel, tensors.first + first_channel, lanes,
                               p.length > 0);
  static thread_local ScratchBuffer<Noted<P>> buffer;
  Noted<P>* const noted = buffer.of(p.tokens);
  weigh<P>(key, p.tokens, dim, lanes, noted);

  const V one = P::same(1.f);
  Sums sums = Sums::none();
  for (int64_t t = p.tokens - 1; t >= 0; t--) {
    noted[t].after = sums;
    sums.fade(c.lambda);
    sums.add(noted[t].weight, {P::get(value + t * dim, lanes), one});
  }
  Sums before = Sums::none(), nearer = Sums::none(), farther = Sums::none();
  const V minus = P::same(-1.f) * c.factor;
  int64_t place = 0;  // within the segment
  for (int64_t t = 0; t < p.tokens; t++) {
    const V own[2] = {P::get(value + t * dim, lanes), one};
    Sums all = Sums::none();
    all.add(P::times(noted[t].weight, c.own), own);
    all.add(c.step, one, before);
    all.add(c.step, one, noted[t].after);
    before.fade(c.lambda);
    before.add(noted[t].weight, own);
    if (p.length > 1) {
      if (place == p.length) {
        place = 0;
        nearer = farther = Sums::none();
      }
      if (place) {
        farther.fade(c.mu);
        farther.add(noted[t].weight, own);
        all.add(c.nearer, c.factor, nearer);
        all.add(c.farther, minus, farther);
      }
      nearer.fade(c.lambda);
      nearer.add(noted[t].weight, own);
      place++;
    }
    V result = all.sum[0] / all.sum[1];
    if (gate) result = result * P::sigmoid(P::get(gate + t * dim, lanes));
    P::put(out + t * dim, result, lanes);
  }
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const auto mild = [&](int64_t image, int64_t channel, int lanes) {
    forward<Factors, T>(p, t, image, channel, lanes);
  };
  const auto wild = [&](int64_t image, int64_t channel) {
    forward<Exponents, T>(p, t, image, channel, 1);
  };
  for_each_block(p, t.decay, t.first, mild, wild);
}

}  // namespace wkv
