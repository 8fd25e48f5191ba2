// Norms: the C interface, called from the Python files beside it.
#include "norm/norm.h"
#include "norm/response.h"
#include "norm/softmax.h"

// Root-mean-square norm over dense channels: the mean is not subtracted.
namespace rms {

using simd::F;
using simd::W;

// rms_norm.py fills in these fields.
struct Problem {
  int64_t pixels, dim, bfloat16;
  double eps;
  int64_t threads;
};

// `in` and `out` are [pixels][dim], `weight` is [dim].
struct Tensors {
  const void* in;
  const float* weight;
  void* out;
};

template <class T>
static void normalise(const Problem& p, const T* in, const float* weight, T* out) {
  const int64_t last = (p.dim - 1) / W * W;
  const int rest = static_cast<int>(p.dim - last);
  F x = simd::get(in + last, rest), sum = x * x;
  for (int64_t c = 0; c < last; c += W) {
    x = simd::load_as_float(in + c);
    sum = simd::fma(x, x, sum);
  }
  const float mean = simd::reduce_add(sum) / static_cast<float>(p.dim);
  const F factor = simd::set1(1.f / std::sqrt(mean + static_cast<float>(p.eps)));
  for (int64_t c = 0; c < p.dim; c += W) {
    const int lanes = c < last ? W : rest;
    simd::put(out + c, simd::get(in + c, lanes) * factor * simd::get(weight + c, lanes), lanes);
  }
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t tasks = std::min(p.threads, p.pixels);
  parallel::for_each(tasks, tasks, [&](int64_t index) {
    for (int64_t i = p.pixels * index / tasks; i < p.pixels * (index + 1) / tasks; i++) {
      normalise(p, static_cast<const T*>(t.in) + i * p.dim, t.weight,
                static_cast<T*>(t.out) + i * p.dim);
    }
  });
}

}  // namespace rms

extern "C" int norm_forward(const norm::Problem* problem, const norm::Tensors* tensors) {
  return status_of([&] { norm::forward(*problem, *tensors); });
}

extern "C" int rms_norm_forward(const rms::Problem* problem, const rms::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    rms::forward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int response_scales_forward(const response::Problem* problem,
                                       const response::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    response::forward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int biased_softmax_forward(const softmax::Problem* problem,
                                      const softmax::Tensors* tensors) {
  return status_of(problem->half_bias, [&](auto bias) {
    with_type(problem->half, [&](auto out) {
      softmax::forward<decltype(bias), decltype(out)>(*problem, *tensors);
    });
  });
}
