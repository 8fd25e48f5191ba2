// Gated linear attention: the C interface, called from gated_scan.py.
#include "norm/norm.h"
#include "scan/backward.h"
#include "scan/forward.h"

namespace gated_scan {

// ---- mixed -------------------------------------------------------------------------------------
// The attention of ViG after its projections: gates from their logits, the scan and, for each token
// that leaves it, the norm and the mixture with the local map.

// All but the norms have the dtype of the tensors.
struct MixedTensors {
  Sequence query, key, value;
  Sequence decay, decay_back;  // logits of the gates
  Sequence gate, local;        // logits of the scan's shares, and the map with the rest
  const float *norm, *local_norm;  // [value_dim]
  void* out;                       // [batch][tokens][heads][value_dim]
};

struct Mixture {
  double eps;  // of both norms
  int64_t activation;
};

// The numerator of a sigmoid: exp(x) below zero, 1 above, for x in -inf … inf, `power` = exp(-|x|).
static VB_INLINE F at_most_one(F x, F power) {
  // A step from 1 to below any power.
  return simd::max(simd::fma(activation::negative(x), simd::set1(1e30f), simd::set1(1.f)), power);
}

static VB_INLINE F minus_magnitude(F x) { return activation::negative(x) - activation::positive(x); }

constexpr int GATE_ROOT = 16;

// The 16th root of the sigmoid: that of exp(min(x, 0)), times (1 + u)^(-1/16) for u = exp(-|x|) in
// 0 … 1, by a Chebyshev polynomial with an error below 4e-8.
static VB_INLINE F root_of_sigmoid(F x) {
  constexpr float TERMS[] = {-7.1102503e-4f, 3.7126574e-3f,  -9.2089353e-3f, 1.5544219e-2f,
                             -2.2387711e-2f, 3.3151720e-2f, -6.2497634e-2f, 1.f};
  const F root = simd::exp2(minus_magnitude(x) * simd::set1(LOG2E / GATE_ROOT));
  F u = root * root;
  for (int power = 2; power < GATE_ROOT; power *= 2) u = u * u;
  F sum = simd::set1(TERMS[0]);
  VB_UNROLL
  for (int i = 1; i < 8; i++) sum = simd::fma(sum, u, simd::set1(TERMS[i]));
  return at_most_one(x, root) * sum;
}

template <class T>
struct Mixed {
  const MixedTensors& t;
  const Mixture& m;

  int directions() const { return 2; }
  const float* bonus() const { return nullptr; }
  const Sequence& decay(int direction) const { return direction ? t.decay_back : t.decay; }

  void gates(const Problem& p, int direction, const Head& at, const Span& span, float* out,
             int64_t pitch) const {
    gather<T>(decay(direction), at, span, 0, p.dim, 1.f, out, pitch);
    for (int64_t c = 0; c < span.count * pitch; c += W) {
      simd::store(out + c, root_of_sigmoid(simd::load(out + c)));
    }
  }
  void fetch_gates(const Problem& p, int direction, const Head& at, const Span& span) const {
    fetch<T>(decay(direction), at, span, 0, p.dim);
    fetch<T>(t.gate, at, span, 0, p.value_dim);
    fetch<T>(t.local, at, span, 0, p.value_dim);
  }

  F factor(F squares, int64_t dim) const {
    const float mean = simd::reduce_add(squares) / static_cast<float>(dim);
    return simd::set1(1.f / std::sqrt(mean + static_cast<float>(m.eps)));
  }

  void finish(const Problem& p, const Part& part, int64_t token, const float* sum) const {
    T* const out = output_row<T>(p, t.out, part.head, token);
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
      const F share = activation::sigmoid(simd::get(gate + c, lanes));
      F mixed = simd::fma(share, x - y, y);
      if (m.activation == activation::SILU) mixed = activation::silu(mixed);
      simd::put(out + c, mixed, lanes);
    }
  }
};

// ---- normed ------------------------------------------------------------------------------------
// The attention of VRWKV6 after its projections: gates from the logits of decays, the scan in both
// directions and, for each token that leaves it, a norm of each head.

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
  const float* bonus() const { return t.bonus; }

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

  void finish(const Problem& p, const Part& part, int64_t token, const float* sum) const {
    const int64_t first = part.head.head * p.value_dim;
    const norm::Norm<float> layer{p.value_dim, t.weight + first, t.bias + first,
                                  static_cast<float>(t.eps)};
    norm::normalise(layer, sum, 1, output_row<T>(p, t.out, part.head, token));
  }
};

}  // namespace gated_scan

extern "C" int gated_scan_forward(const gated_scan::Problem* problem,
                                  const gated_scan::ForwardTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    gated_scan::forward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int gated_scan_mixed(const gated_scan::Problem* problem,
                                const gated_scan::MixedTensors* tensors,
                                const gated_scan::Mixture* mixture) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    gated_scan::scan_heads<T>(*problem, gated_scan::Mixed<T>{*tensors, *mixture});
  });
}

extern "C" int gated_scan_normed(const gated_scan::Problem* problem,
                                 const gated_scan::NormedTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    using T = decltype(type);
    gated_scan::scan_heads<T>(*problem, gated_scan::Normed<T>{*tensors});
  });
}

extern "C" int gated_scan_backward(const gated_scan::Problem* problem,
                                   const gated_scan::BackwardTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    gated_scan::differentiate<decltype(type)>(*problem, *tensors);
  });
}
