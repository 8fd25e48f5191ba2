// Dynamic convolutions: weighted sums of values in which a query's weights are the softmax of its
// products with keys, to which a table is added first. The weights of a few queries are computed at
// a time, and never leave the L1 cache.
#pragma once
#include "neighborhood/mapped_keys.h"
#include "neighborhood/narrow.h"

namespace na {

// `query` and `key` are in the values' type; `weight` is [places][keys], `bias`
// [heads][queries][keys].
struct DynamicTensors {
  Tensor out, value;
  const void *query, *key;
  const float* weight;
  const void* bias;
};

// Powers of two. Results that are rounded to bfloat16 have an error below 8e-5 before.
template <class T, int N>
static VB_INLINE void exp2_for(F (&x)[N]) {
#if VB_AVX512
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int DOWN = 1;  // rounding, so that remainders are in [0, 1)
    VB_UNROLL
    for (int i = 0; i < N; i++) {
      const F rest = _mm512_reduce_ps(x[i], DOWN);
      F power = simd::fma(rest, simd::set1(0.07802452f), simd::set1(0.22606716f));
      power = simd::fma(rest, power, simd::set1(0.69583354f));
      power = simd::fma(rest, power, simd::set1(0.99992522f));
      x[i] = _mm512_scalef_ps(power, x[i]);
    }
    return;
  }
#endif
  simd::exp2(x);
}

// The weights of the queries of one head, not divided by their sums.
template <class T, class B>
class DynamicWeights {
  using P = Products<T>;

 public:
  DynamicWeights(const weights::Problem& p, const DynamicTensors& t, int image, int head,
                 int64_t width)
      : p_(p),
        query_(static_cast<const T*>(t.query) + image * p.query_stride[0] +
               head * p.query_stride[1]),
        table_(static_cast<const B*>(t.bias) + head * p.queries * p.keys),
        width_(width),
        rows_(std::max<int64_t>(1, QUERIES / width)),
        steps_(simd::steps<P>(static_cast<int>(p.depth))),
        pitch_(simd::round_up(p.keys, W)),
        end_(softmax::end_of(p.keys)) {
    static thread_local Buffer buffers[4];
    const int64_t queries = rows_ * width;
    mapped_ = buffers[0].get(p.depth * pitch_);
    scratch_ = buffers[1].get(std::max(p.places * (pitch_ + p.depth),
                                       softmax::ROWS * (pitch_ + steps_ + W)));
    weights_ = reinterpret_cast<T*>(buffers[2].get(queries * pitch_));
    factors_ = buffers[3].get(queries);
    weights::map_keys(p,
                      static_cast<const T*>(t.key) + image * p.key_stride[0] +
                          head * p.key_stride[1],
                      t.weight, pitch_, scratch_, mapped_);
    if constexpr (P::COUNT == 2) pair_channels<P>();
  }

  // Those of a row of queries; rows are asked for in order.
  RowWeights<T> row(int64_t y) {
    if (y >= known_) {
      first_ = y;
      known_ = std::min(p_.queries / width_, y + rows_);
      softmax::each_rows(y * width_, known_ * width_, [&](auto size, int64_t query) {
        find<size.value>(query, query - first_ * width_);
      });
    }
    const int64_t begin = (y - first_) * width_;
    return {weights_ + begin * pitch_, pitch_, factors_ + begin};
  }

 private:
  static constexpr int64_t QUERIES = 48;  // at a time, so that few of them are computed one by one

  template <class Pairs>
  void pair_channels() {
    for (int64_t k = 0; k < steps_; k++) {
      const float* const first = mapped_ + 2 * k * pitch_;
      for (int64_t c = 0; c < pitch_; c += W) {
        const F second = 2 * k + 1 < p_.depth ? simd::load(first + pitch_ + c) : simd::zero();
        simd::store(mapped_ + k * pitch_ + c, Pairs::pack(simd::load(first + c), second));
      }
    }
  }

  // The weights of R queries, from `place` on.
  template <int R>
  void find(int64_t query, int64_t place) {
    float* const logits = scratch_;
    float* const rows = scratch_ + R * pitch_;
    const B* bias[R];
    for (int r = 0; r < R; r++) {
      bias[r] = table_ + (query + r) * p_.keys;
      const T* const from = query_ + (query + r) * p_.query_stride[2];
      float* const to = rows + r * steps_;
      if constexpr (P::COUNT == 2) {
        to[steps_ - 1] = 0.f;
        std::memcpy(to, from, p_.depth * sizeof(T));
      } else {
        for (int64_t k = 0; k < p_.depth; k++) to[k] = simd::to_float(from[k]);
      }
    }
    const char* const next = reinterpret_cast<const char*>(bias[R - 1] + p_.keys);
    for (size_t b = 0; b < R * p_.keys * sizeof(B); b += CACHE_LINE) __builtin_prefetch(next + b);
    F most[R], sum[R];
    for (int r = 0; r < R; r++) most[r] = simd::set1(-std::numeric_limits<float>::infinity());
    const int rest = static_cast<int>((p_.keys - 1) % W + 1);
    const auto from_table = [&](int r, int64_t c) VB_INLINE_LAMBDA {
      if (c + W < pitch_) return simd::load_as_float(bias[r] + c);
      return simd::get(bias[r] + c, rest) + end_;
    };
    const auto keep = [&](int r, int64_t c, F logit) VB_INLINE_LAMBDA {
      simd::store(logits + r * pitch_ + c, logit);
      most[r] = simd::max(most[r], logit);
    };
    weights::multiply<R, P>(steps_, rows, mapped_, pitch_, from_table, keep);
    const F scale = simd::set1(softmax::LOG2E);
    for (int r = 0; r < R; r++) {
      most[r] = simd::set1(-softmax::LOG2E * softmax::largest(most[r]));
      sum[r] = simd::zero();
    }
    for (int64_t c = 0; c < pitch_; c += W) {
      F x[R];
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        x[r] = simd::fma(simd::load(logits + r * pitch_ + c), scale, most[r]);
      }
      exp2_for<T>(x);
      VB_UNROLL
      for (int r = 0; r < R; r++) {
        simd::store_from_float(weights_ + (place + r) * pitch_ + c, x[r]);
        sum[r] = sum[r] + x[r];
      }
    }
    for (int r = 0; r < R; r++) factors_[place + r] = 1.f / simd::reduce_add(sum[r]);
  }

  const weights::Problem& p_;
  const T* query_;
  const B* table_;
  int64_t width_, rows_, steps_, pitch_;
  F end_;
  float *mapped_, *scratch_, *factors_;
  T* weights_;
  int64_t first_ = 0, known_ = 0;
};

template <class T, class B>
static void mix_dynamic(const Problem& p, const weights::Problem& queries,
                        const DynamicTensors& t) {
  for_each_band(p, [&](const Layout& layout, int b, int h, int first, int end) {
    DynamicWeights<T, B> found(queries, t, b, h, p.size[2]);
    mix_narrow_rows<T>(p, layout, t.out, t.value, b, h, first, end,
                       [&](int, int y) { return found.row(y); });
  });
}

}  // namespace na
