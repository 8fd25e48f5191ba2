// Bi-WKV and the mixtures before it: the C interface, called from bi_wkv.py and shift.py.
#include "wkv/backward.h"

// Several mixtures of each pixel of a map with its neighbours.
namespace shift {

using simd::F;
using simd::W;

// shift.py fills in these fields. In each of `groups` runs of channels, the four quarters take the
// left, right, upper and lower neighbour; there are zeros beyond the border.
struct Problem {
  int64_t batch, height, width, dim;
  int64_t groups, mixtures;
  int64_t bfloat16, threads;
};

// `in` is [batch][height][width][dim], `out` [mixtures] of that shape, `shares` [mixtures][dim]:
// the share of the pixel; the neighbour has the rest.
struct Tensors {
  const void* in;
  const float* shares;
  void* out;
};

template <int N, class T>
static void mix_run(const T* own, const T* other, const float* const (&shares)[N], int64_t count,
                    T* const (&out)[N]) {
  for (int64_t c = 0; c < count; c += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, count - c));
    const F neighbour = other ? simd::get(other + c, lanes) : simd::zero();
    const F change = simd::get(own + c, lanes) - neighbour;
    for (int n = 0; n < N; n++) {
      simd::put(out[n] + c, simd::fma(change, simd::get(shares[n] + c, lanes), neighbour), lanes);
    }
  }
}

template <int N, class T>
static void mix_row(const Problem& p, const Tensors& t, int64_t row) {
  const int64_t rows = p.batch * p.height, y = row % p.height, quarter = p.dim / (4 * p.groups);
  const int64_t step = p.width * p.dim;
  const T* in = static_cast<const T*>(t.in) + row * step;
  for (int64_t x = 0; x < p.width; x++) {
    const bool exists[4] = {x > 0, x + 1 < p.width, y > 0, y + 1 < p.height};
    const int64_t distance[4] = {-p.dim, p.dim, -step, step};
    for (int64_t run = 0; run < 4 * p.groups; run++) {
      const int64_t channel = run * quarter, place = x * p.dim + channel, side = run % 4;
      const float* shares[N];
      T* out[N];
      for (int n = 0; n < N; n++) {
        shares[n] = t.shares + n * p.dim + channel;
        out[n] = static_cast<T*>(t.out) + (n * rows + row) * step + place;
      }
      const T* const other = exists[side] ? in + place + distance[side] : nullptr;
      mix_run<N, T>(in + place, other, shares, quarter, out);
    }
  }
}

template <class T>
static void mix(const Problem& p, const Tensors& t) {
  parallel::for_each(p.batch * p.height, p.threads, [&](int64_t row) {
    with_constant<3>(p.mixtures, [&](auto count) { mix_row<count.value, T>(p, t, row); });
  });
}

}  // namespace shift

extern "C" int wkv_forward(const wkv::Problem* problem, const wkv::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    wkv::forward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int wkv_backward(const wkv::Problem* problem, const wkv::GradTensors* tensors) {
  return status_of([&] { wkv::backward(*problem, *tensors); });
}

extern "C" int wkv_shifted_mixtures(const shift::Problem* problem, const shift::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    shift::mix<decltype(type)>(*problem, *tensors);
  });
}
