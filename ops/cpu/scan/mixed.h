// The attention of ViG from its projections on: gates from their logits, the scan, and as each
// token leaves it, its norm and its mixture with the map.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include "common/activation.h"
#include "scan/forward.h"

namespace gated_scan {

// All but the norms in the dtype of the tensors.
struct MixedTensors {
  Sequence query, key, value;
  Sequence decay, decay_back;  // logits of the gates
  Sequence gate, local;        // logits of the shares of the scan, and what the rest is of
  const float *norm, *local_norm;  // [value_dim]
  void* out;                       // [batch][tokens][heads][value_dim]
};

struct Mixture {
  double divisor;  // of the logarithms of the gates
  double eps;      // of both norms
  int64_t activation;
};

// Exponents are never positive.
static VB_INLINE F sigmoid(F x) {
  const F down = activation::negative(x) * simd::set1(LOG2E);
  const F up = activation::positive(x) * simd::set1(LOG2E);
  return simd::exp2(down) / (simd::set1(1.f) + simd::exp2(down - up));
}

// log2(1 + x) for x in 0 … 1 within 2e-8 and rounding: the odd series of log((1 + t) / (1 - t)).
static VB_INLINE F log2_of_more(F x) {
  const F t = x / (x + simd::set1(2.f)), t2 = t * t;
  F p = simd::set1(1.f / 13.f);
  for (float odd = 11.f; odd > 0.f; odd -= 2.f) p = simd::fma(p, t2, simd::set1(1.f / odd));
  return t * p * simd::set1(2.885390082f);  // 2 / ln 2
}

template <class T>
struct Mixed {
  const MixedTensors& t;
  const Mixture& m;

  int directions() const { return 2; }
  const Sequence& decay(int direction) const { return direction ? t.decay_back : t.decay; }

  // exp(log(sigmoid(x)) / divisor)
  void gates(const Problem& p, int direction, const Head& at, const Span& span, float* out,
             int64_t pitch) const {
    gather<T>(decay(direction), at, span, 0, p.dim, LOG2E, out, pitch);
    const F share = simd::set1(static_cast<float>(1 / m.divisor));
    for (int64_t c = 0; c < span.count * pitch; c += W) {
      const F x = simd::load(out + c), down = activation::negative(x);
      const F power = simd::exp2(down - activation::positive(x));
      simd::store(out + c, simd::exp2((down - log2_of_more(power)) * share));
    }
  }
  void fetch_gates(const Problem& p, int direction, const Head& at, const Span& span) const {
    fetch<T>(decay(direction), at, span, 0, p.dim);
    fetch<T>(t.gate, at, span, 0, p.value_dim);
    fetch<T>(t.local, at, span, 0, p.value_dim);
  }

  float own(const Problem&, const Head&, const float*, const float*) const { return 0.f; }

  F factor(F squares, int64_t dim) const {
    const float mean = simd::reduce_add(squares) / static_cast<float>(dim);
    return simd::set1(1.f / std::sqrt(mean + static_cast<float>(m.eps)));
  }

  void finish(const Problem& p, const Part& part, int64_t token, const float* sum) const {
    const int64_t row_of = (part.head.image * p.tokens + token) * p.heads + part.head.head;
    T* out = static_cast<T*>(t.out) + row_of * p.value_dim;
    const T *gate = row<T>(t.gate, part.head, token), *local = row<T>(t.local, part.head, token);
    F scanned = simd::zero(), nearby = simd::zero();
    for (int64_t c = 0; c < p.value_dim; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.value_dim - c));
      const F x = simd::load(sum + c), y = simd::get(local + c, lanes);
      scanned = simd::fma(x, x, scanned);
      nearby = simd::fma(y, y, nearby);
    }
    scanned = factor(scanned, p.value_dim);
    nearby = factor(nearby, p.value_dim);
    for (int64_t c = 0; c < p.value_dim; c += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, p.value_dim - c));
      const F x = simd::load(sum + c) * scanned * simd::get(t.norm + c, lanes);
      const F y = simd::get(local + c, lanes) * nearby * simd::get(t.local_norm + c, lanes);
      const F share = sigmoid(simd::get(gate + c, lanes));
      F mixed = simd::fma(share, x - y, y);
      if (m.activation == activation::SILU) mixed = activation::silu(mixed);
      simd::put(out + c, mixed, lanes);
    }
  }
};

template <class T>
static void forward(const Problem& p, const MixedTensors& t, const Mixture& m) {
  const Mixed<T> mixed{t, m};
  const int64_t heads = p.batch * p.heads;
  const auto work = [&](int64_t head) {
    scan<T>(p, mixed, {{head / p.heads, head % p.heads}, 0, p.value_dim});
  };
  parallel::for_each(heads, p.threads, work);
}

}  // namespace gated_scan
