// The attention of VRWKV6 after its projections: gates from the logits of decays, the scan in both
// directions and, for each token that leaves it, a norm of each head.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/activation.h"
#include "norm/norm.h"
#include "scan/forward.h"

namespace gated_scan {

// Vectors are [heads][channels], in float32.
struct NormedTensors {
  Sequence query, key, value;
  Sequence decay;  // a gate is exp(-exp(decay + decay_bias))
  const float *decay_bias, *bonus;
  const float *weight, *bias;  // of the norm
  double eps;
  void* out;  // [batch][tokens][heads][value_dim]
};

template <class T>
struct Normed {
  const NormedTensors& t;

  int directions() const { return 2; }

  void gates(const Problem& p, int, const Head& at, const Span& span, float* out,
             int64_t pitch) const {
    gather<T>(t.decay, at, span, 0, p.dim, 1.f, out, pitch);
    const float* const bias = t.decay_bias + at.head * p.dim;
    for (int i = 0; i < span.count; i++, out += pitch) {
      for (int64_t c = 0; c < p.dim; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.dim - c));
        const F decay = simd::load(out + c) + simd::get(bias + c, lanes);
        simd::store(out + c, simd::exp2(activation::limited_exp(decay, 1) * simd::set1(-LOG2E)));
      }
    }
  }
  void fetch_gates(const Problem& p, int, const Head& at, const Span& span) const {
    fetch<T>(t.decay, at, span, 0, p.dim);
  }

  void fetch_outputs(const Problem& p, const Part& part, const Span& span) const {
    gated_scan::fetch_outputs<T>(p, t.out, part.head, span, 0, p.value_dim);
  }

  float own(const Problem& p, const Head& at, const float* query, const float* key) const {
    return own_weight(p, t.bonus + at.head * p.dim, query, key);
  }

  void finish(const Problem& p, const Part& part, int64_t token, const float* sum) const {
    const int64_t first = part.head.head * p.value_dim;
    const norm::Norm<float> layer{p.value_dim, t.weight + first, t.bias + first,
                                  static_cast<float>(t.eps)};
    norm::normalise(layer, sum, 1, output_row<T>(p, t.out, part.head, token));
  }
};

template <class T>
static void forward(const Problem& p, const NormedTensors& t) {
  scan_heads<T>(p, Normed<T>{t});
}

}  // namespace gated_scan
