// Exponentially weighted sums in two representations: plain factors, for W channels in float, or
// exponents that cannot overflow, for one channel in double.
#pragma once
#include "common/kernel.h"
#include "common/activation.h"

namespace wkv {

using simd::F;
using simd::W;

static VB_INLINE F exponential(F x) { return simd::exp2(x * simd::set1(1.44269504f)); }

struct Factors {
  using V = F;
  static constexpr int LANES = W;

  // A factor that is applied per token, with its rounding error.
  struct Decay {
    F high, low;
  };

  static F number(const double (&x)[W]) {
    float rounded[W];
    for (int l = 0; l < W; l++) rounded[l] = static_cast<float>(x[l]);
    return simd::load(rounded);
  }
  static F weight(const double (&exponent)[W]) {
    double x[W];
    for (int l = 0; l < W; l++) x[l] = std::exp(exponent[l]);
    return number(x);
  }
  static Decay decay(const double (&exponent)[W]) {
    double x[W], rest[W];
    for (int l = 0; l < W; l++) {
      x[l] = std::exp(exponent[l]);
      rest[l] = x[l] - static_cast<float>(x[l]);
    }
    return {number(x), number(rest)};
  }

  static VB_INLINE F same(float x) { return simd::set1(x); }
  template <class T>
  static VB_INLINE F get(const T* in, int lanes) {
    return simd::get(in, lanes);
  }
  template <class T>
  static VB_INLINE void put(T* out, F x, int lanes) {
    simd::put(out, x, lanes);
  }
  static VB_INLINE F greater(F a, F b) { return simd::max(a, b); }
  // The weight of a key relative to the greatest key.
  static VB_INLINE F weight_of(F key, F greatest) { return exponential(key - greatest); }
  static VB_INLINE F times(F a, F b) { return a * b; }
  static VB_INLINE F sigmoid(F x) { return activation::sigmoid(x); }

  template <int N>
  struct Sums {
    F sum[N];

    static VB_INLINE Sums none() {
      Sums s;
      for (int n = 0; n < N; n++) s.sum[n] = simd::zero();
      return s;
    }
    VB_INLINE void fade(const Decay& decay) {
      for (int n = 0; n < N; n++) {
        sum[n] = simd::fma(sum[n], decay.high, sum[n] * decay.low);
      }
    }
    VB_INLINE void add(F weight, const F (&x)[N]) {
      for (int n = 0; n < N; n++) sum[n] = simd::fma(weight, x[n], sum[n]);
    }
    VB_INLINE void add(F weight, F factor, const Sums& other) {
      for (int n = 0; n < N; n++) sum[n] = simd::fma(weight * factor, other.sum[n], sum[n]);
    }
    // The same sums of M derived numbers.
    template <int M>
    VB_INLINE Sums<M> with(const F (&x)[M]) const {
      Sums<M> s;
      for (int n = 0; n < M; n++) s.sum[n] = x[n];
      return s;
    }
    // A weight relative to these sums, and the weight of a quotient by them.
    VB_INLINE F share(F weight) const { return weight; }
    VB_INLINE F inverse() const { return simd::set1(1.f); }
    // The sums times a weight.
    VB_INLINE F scaled(F weight, int n) const { return weight * sum[n]; }
  };
};

struct Exponents {
  using V = double;
  using Decay = double;
  static constexpr int LANES = 1;

  static double number(const double (&x)[1]) { return x[0]; }
  static double weight(const double (&exponent)[1]) { return exponent[0]; }
  static double decay(const double (&exponent)[1]) { return exponent[0]; }
  static double same(float x) { return x; }
  template <class T>
  static double get(const T* in, int) {
    return simd::to_float(*in);
  }
  template <class T>
  static void put(T* out, double x, int) {
    simd::assign(out, static_cast<float>(x));
  }
  static double greater(double a, double b) { return std::max(a, b); }
  static double weight_of(double key, double) { return key; }
  static double times(double a, double b) { return a + b; }
  static double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

  template <int N>
  struct Sums {
    double scale;  // an exponent, at least that of each term
    double sum[N];

    static Sums none() { return {-1e300, {}}; }
    void fade(double decay) { scale += decay; }
    void add(double weight, const double (&x)[N]) { add(weight, 1.0, x); }
    void add(double weight, double factor, const Sums& other) {
      add(weight + other.scale, factor, other.sum);
    }
    void add(double weight, double factor, const double (&x)[N]) {
      const double greatest = std::max(scale, weight);
      const double before = std::exp(scale - greatest), now = factor * std::exp(weight - greatest);
      for (int n = 0; n < N; n++) sum[n] = before * sum[n] + now * x[n];
      scale = greatest;
    }
    template <int M>
    Sums<M> with(const double (&x)[M]) const {
      Sums<M> s{scale, {}};
      for (int n = 0; n < M; n++) s.sum[n] = x[n];
      return s;
    }
    double share(double weight) const { return std::exp(weight - scale); }
    double inverse() const { return -scale; }
    double scaled(double weight, int n) const { return std::exp(weight + scale) * sum[n]; }
  };
};

}  // namespace wkv
