// Cascaded attention within the small maps of low-latency networks: narrow heads in sequence, each
// applied to its channels plus the previous head's output. Everything between two projections over
// all channels is one pass while an image's map is in the cache: norm, queries, keys and values, a
// depthwise convolution of the queries, attention with a table of biases, and the ReLU, which also
// applies to the channels that do not attend.
#include "common/kernel.h"
#include "attention/group.h"
#include "attention/products.h"
#include "common/activation.h"
#include "depthwise/direct.h"
#include "gemm/call.h"

namespace cascaded_attention {

using attention::Floats;
using attention::TILE;
using simd::F;
using simd::W;

// cascaded.py fills in these fields.
struct Problem {
  int64_t images, height, width, dim;
  int64_t heads, head_dim, qk_dim;  // the first heads * head_dim ≤ dim channels attend
  double eps;                       // of the norm
  int64_t bfloat16, threads;
};

// `in` and `out` are [image][height][width][dim]. A head's `weight`, packed by pack.h, and `bias`
// have 2 * qk_dim + head_dim outputs: query, key, value. Null if unused: `norm_weight` and
// `norm_bias` [heads * head_dim], of a norm over all positions and channels of a head; `kernels`
// [heads], the window sides, whose `taps` [side][side][qk_dim] are concatenated, with `taps_bias`
// [heads][qk_dim]; `table` [heads][key][query].
struct Tensors {
  const void* in;
  const float *norm_weight, *norm_bias;
  const void* weight;
  const float* bias;
  const int64_t* kernels;
  const float *taps, *taps_bias, *table;
  void* out;
};

template <class T>
struct Scratch {
  std::vector<T> shares, projected;
  std::vector<float> floats, keys, queries, tile, scores, sums, outs;
};

template <class U>
static U* resized(std::vector<U>& buffer, int64_t count) {
  if (buffer.size() < static_cast<size_t>(count)) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

static const float* as_floats(const float* in, int64_t, std::vector<float>&) { return in; }
static const float* as_floats(const BFloat16* in, int64_t count, std::vector<float>& buffer) {
  float* out = resized(buffer, count + W);  // whole vectors are written
  attention::to_floats(in, out, static_cast<int>(count));
  return out;
}

// One image.
template <class T>
struct Task {
  const Problem& p;
  const Tensors& t;
  const T* in;
  T* out;
  Scratch<T>& s;
  int64_t tokens = p.height * p.width;
  int64_t features = 2 * p.qk_dim + p.head_dim;
  int64_t qk_pitch = simd::round_up(p.qk_dim, W), out_pitch = simd::round_up(p.head_dim, W);

  void run() const {
    const int64_t whole = simd::round_up(tokens, TILE);
    resized(s.keys, tokens * p.qk_dim);
    resized(s.queries, whole * qk_pitch);
    resized(s.tile, qk_pitch * TILE);
    resized(s.scores, tokens * TILE);
    resized(s.sums, out_pitch * TILE);
    resized(s.outs, whole * out_pitch);
    const float* taps = t.taps;
    for (int64_t head = 0; head < p.heads; head++) {
      const float* projected = project(head);
      const int64_t side = t.taps ? t.kernels[head] : 0;
      take_keys(projected + p.qk_dim);
      take_queries(head, projected, side, taps);
      taps += side * side * p.qk_dim;
      for (int64_t first = 0; first < tokens; first += TILE) {
        attend(head, projected + 2 * p.qk_dim, first);
        give(head, first);
      }
    }
    for (int64_t token = 0; token < tokens; token++) {
      for_channels(p.dim - p.heads * p.head_dim, [&](int64_t c, int lanes) {
        const int64_t at = token * p.dim + p.heads * p.head_dim + c;
        simd::put(out + at, activation::positive(simd::get(in + at, lanes)), lanes);
      });
    }
  }

  template <class Work>
  static void for_channels(int64_t channels, const Work& work) {
    for (int64_t c = 0; c < channels; c += W) {
      work(c, static_cast<int>(std::min<int64_t>(W, channels - c)));
    }
  }

  // A head's inputs before the norm; zeros past the last channel.
  F seen(int64_t head, int64_t token, int64_t c, int lanes) const {
    const F x = simd::get(in + token * p.dim + head * p.head_dim + c, lanes);
    return head ? x + simd::get(s.outs.data() + token * out_pitch + c, lanes) : x;
  }

  // The mean, and the reciprocal of the standard deviation.
  void statistics(int64_t head, float* mean, float* factor) const {
    const float count = static_cast<float>(tokens * p.head_dim);
    F sum = simd::zero(), squares = simd::zero();
    for (int64_t token = 0; token < tokens; token++) {
      for_channels(p.head_dim, [&](int64_t c, int lanes) {
        sum = sum + seen(head, token, c, lanes);
      });
    }
    *mean = simd::reduce_add(sum) / count;
    float centre[W];
    std::fill_n(centre, W, *mean);
    for (int64_t token = 0; token < tokens; token++) {
      for_channels(p.head_dim, [&](int64_t c, int lanes) {
        const F x = seen(head, token, c, lanes) - simd::get(centre, lanes);
        squares = simd::fma(x, x, squares);
      });
    }
    *factor = 1.f / std::sqrt(simd::reduce_add(squares) / count + static_cast<float>(p.eps));
  }

  // [token][query, key, value]
  const float* project(int64_t head) const {
    const int64_t pitch = linear::padded_inputs(in, p.head_dim);
    T* shares = resized(s.shares, tokens * pitch);
    float mean = 0, factor = 1;
    if (t.norm_weight) statistics(head, &mean, &factor);
    for (int64_t token = 0; token < tokens; token++) {
      T* share = shares + token * pitch;
      for_channels(p.head_dim, [&](int64_t c, int lanes) {
        F x = seen(head, token, c, lanes);
        if (t.norm_weight) {
          const int64_t channel = head * p.head_dim + c;
          x = simd::fma((x - simd::set1(mean)) * simd::set1(factor),
                        simd::get(t.norm_weight + channel, lanes),
                        simd::get(t.norm_bias + channel, lanes));
        }
        simd::put(share + c, x, lanes);
      });
      std::fill(share + p.head_dim, share + pitch, T{});
    }
    linear::map_rows(shares, tokens, pitch,
                     static_cast<const T*>(t.weight) +
                         head * linear::packed_size(shares, features, p.head_dim),
                     t.bias + head * features, features, activation::NONE,
                     resized(s.projected, tokens * features));
    return as_floats(s.projected.data(), tokens * features, s.floats);
  }

  void take_keys(const float* key) const {
    float* to = s.keys.data();
    for (int64_t token = 0; token < tokens; token++, key += features, to += p.qk_dim) {
      simd::copy(key, p.qk_dim, to);
    }
  }

  void take_queries(int64_t head, const float* query, int64_t side, const float* taps) const {
    float* to = s.queries.data();
    if (side) {
      const depthwise::Problem problem{
          1, p.qk_dim, 1, {p.height, p.width}, {p.height, p.width}, {side, side}, {1, 1},
          {side / 2, side / 2}, {1, 1}, {0, p.width * features, features},
          {0, p.width * qk_pitch, qk_pitch}, activation::NONE, 0, 1};
      depthwise::forward_any<float>(problem, {query, taps, t.taps_bias + head * p.qk_dim, to});
      return;
    }
    for (int64_t token = 0; token < tokens; token++, query += features, to += qk_pitch) {
      simd::copy(query, p.qk_dim, to);
    }
  }

  // The weighted sums of values for the queries from `first` on, as columns.
  void attend(int64_t head, const float* values, int64_t first) const {
    const int64_t count = std::min<int64_t>(TILE, tokens - first);
    const int vectors = static_cast<int>((count + W - 1) / W), keys = static_cast<int>(tokens);
    const int dim = static_cast<int>(p.qk_dim);
    const F scale = simd::set1(attention::LOG2E / std::sqrt(static_cast<float>(p.qk_dim)));
    for (int v = 0; v < vectors; v++) {
      for (int64_t c = 0; c < qk_pitch; c += W) {
        float* to = s.tile.data() + c * TILE + v * W;
        simd::transpose(s.queries.data() + (first + v * W) * qk_pitch + c, qk_pitch, to, TILE, W);
        for (int i = 0; i < W; i++) simd::store(to + i * TILE, simd::load(to + i * TILE) * scale);
      }
    }
    float top[TILE];
    std::fill_n(top, TILE, -INFINITY);
    attention::in_parts(keys, [&](int k, int part) {
      attention::SCORE<Floats>[vectors - 1][part - 1](
          {s.tile.data(), s.keys.data() + k * dim, dim, {}, {}, s.scores.data() + k * TILE, top});
    });
    for (int v = 0; v < vectors; v++) {
      float* scores = s.scores.data() + v * W;
      F now = simd::load(top + v * W);
      if (t.table) {
        now = simd::set1(-INFINITY);
        const int lanes = static_cast<int>(std::min<int64_t>(W, count - v * W));
        const float* biases = t.table + head * tokens * tokens + first + v * W;
        for (int64_t k = 0; k < tokens; k++, biases += tokens) {
          float* score = scores + k * TILE;
          const F x = simd::fma(simd::get(biases, lanes), simd::set1(attention::LOG2E),
                                simd::load(score));
          simd::store(score, x);
          now = simd::max(now, x);
        }
      }
      F total[2] = {simd::zero(), simd::zero()};
      for (int64_t k = 0; k < tokens; k++) {
        const F x = simd::exp2(simd::load(scores + k * TILE) - now);
        simd::store(scores + k * TILE, x);
        total[k % 2] = total[k % 2] + x;
      }
      simd::store(top + v * W, simd::set1(1.f) / (total[0] + total[1]));
    }
    attention::in_parts(static_cast<int>(p.head_dim), [&](int c, int part) {
      attention::MIX<Floats>[vectors - 1][part - 1]({s.scores.data(), values + c, keys,
                                                     static_cast<int>(features), nullptr,
                                                     s.sums.data() + c * TILE});
    });
    for (int v = 0; v < vectors; v++) {
      const F share = simd::load(top + v * W);
      for (int64_t c = 0; c < p.head_dim; c++) {
        float* sum = s.sums.data() + c * TILE + v * W;
        simd::store(sum, simd::load(sum) * share);
      }
      for (int64_t c = 0; c < out_pitch; c += W) {
        simd::transpose(s.sums.data() + c * TILE + v * W, TILE,
                        s.outs.data() + (first + v * W) * out_pitch + c, out_pitch, W);
      }
    }
  }

  void give(int64_t head, int64_t first) const {
    const int64_t end = std::min(tokens, first + TILE);
    for (int64_t token = first; token < end; token++) {
      for_channels(p.head_dim, [&](int64_t c, int lanes) {
        const F x = simd::load(s.outs.data() + token * out_pitch + c);
        simd::put(out + token * p.dim + head * p.head_dim + c, activation::positive(x), lanes);
      });
    }
  }
};

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  parallel::for_each(p.images, p.threads, [&](int64_t image) {
    static thread_local Scratch<T> s;
    const int64_t start = image * p.height * p.width * p.dim;
    Task<T>{p, t, static_cast<const T*>(t.in) + start, static_cast<T*>(t.out) + start, s}.run();
  });
}

}  // namespace cascaded_attention

// The C interface, called from cascaded.py.
extern "C" int cascaded_attention_forward(const cascaded_attention::Problem* problem,
                                          const cascaded_attention::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    cascaded_attention::forward<decltype(type)>(*problem, *tensors);
  });
}
