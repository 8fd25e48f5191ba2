// Forward: for each tile of queries, the scores of a block of keys, an online softmax, and the
// weighted sum of values
// ("FlashAttention", Dao et al. 2022, with the window of "Neighborhood Attention Transformer",
// Hassani et al. 2023).
#pragma once
#include "neighborhood/work_item.h"

namespace na {

struct ForwardTensors {
  Tensor query, key, value, additional_key, additional_value;
  const float* rpb;
  Tensor out, lse;  // lse.data may be null
};

template <class T>
using ForwardKeys = KeyRing<T, Products<T>, Products<T>>;

template <class T>
struct ForwardScratch : ItemScratch<ForwardKeys<T>> {
  Buffer query, score, sum;
};

// Turns the scores of some key rows of `width` keys into unnormalised probabilities, stored in the
// steps of P at the start of each row. Adds to two sums.
template <class P>
static VB_INLINE void weigh(float* score, int rows, int width, F top, F (&sum)[2]) {
  const auto take = [&](const float* p, int i) VB_INLINE_LAMBDA {
    const F x = simd::exp2(simd::load(p) - top);
    sum[i] = sum[i] + x;
    return x;
  };
  if constexpr (P::COUNT == 1) {
    const int n = rows * width;
    int i = 0;
    for (; i + 1 < n; i += 2, score += 2 * W) {
      const F x = take(score, 0), y = take(score + W, 1);
      simd::store(score, x);
      simd::store(score + W, y);
    }
    if (i < n) simd::store(score, take(score, 0));
  } else {
    for (int y = 0; y < rows; y++, score += static_cast<size_t>(width) * W) {
      float* out = score;
      const float* p = score;
      int k = 0;
      for (; k + 1 < width; k += 2, p += 2 * W, out += W) {
        const F first = take(p, 0), second = take(p + W, 1);
        simd::store(out, P::pack(first, second));
      }
      if (k < width) simd::store(out, P::pack(take(p, 0), simd::zero()));
    }
  }
}

// Clamps infinite scores of query row `r` to the largest finite number.
static void limit_scores(const Slice* first, const Slice* last, int r, float* score) {
  for (const Slice* s = first; s < last; s++) {
    if (r < s->row || r >= s->row + s->row_count) continue;
    float* p = score + r * SCORE_PITCH + static_cast<size_t>(s->slot) * W;
    for (int i = 0; i < s->rows * s->width; i++, p += W)
      simd::store(p, simd::at_most_finite(simd::load(p)));
  }
}

// Turns scores into unnormalised probabilities in place, see `weigh`. `top` and `total` carry each
// lane's maximum and sum from block to block; if the maximum has grown, the sums of values so far
// are rescaled.
template <class P>
static void online_softmax(const Slice* first, const Slice* last, const TilePlace& place,
                           const Lanes& shared, float* score, float (*top)[W], float (*total)[W],
                           float* sum, int pitch) {
  for (int r = 0; r < place.tile.rows; r++) {
    const F before = simd::load(top[r]);
    F a = before, b = before;
    bool seen = false;
    for (const Slice* s = first; s < last; s++) {
      if (r < s->row || r >= s->row + s->row_count) continue;
      seen = true;
      float* p = score + r * SCORE_PITCH + static_cast<size_t>(s->slot) * W;
      const Lanes& lanes = s->plane < 0 ? shared : place.lanes;
      if (lanes.ragged) {
        for (int y = 0; y < s->rows; y++) {
          for (int k = 0; k < s->width; k++, p += W) {
            const F x =
                simd::keep_below(simd::load(p), lanes.count, s->offset + k, simd::set1(-INFINITY));
            simd::store(p, x);
            a = simd::max(a, x);
          }
        }
        continue;
      }
      const int n = s->rows * s->width;
      int i = 0;
      for (; i + 1 < n; i += 2, p += 2 * W) {
        a = simd::max(a, simd::load(p));
        b = simd::max(b, simd::load(p + W));
      }
      if (i < n) a = simd::max(a, simd::load(p));
    }
    if (!seen) continue;
    const F now = simd::max(a, b);
    // The difference of infinities is NaN; next to an infinite score, the others must still vanish.
    const F highest = simd::finite(now);
    if (!simd::all_equal(now, highest)) limit_scores(first, last, r, score);
    F sums[2] = {simd::zero(), simd::zero()};
    for (const Slice* s = first; s < last; s++) {
      if (r < s->row || r >= s->row + s->row_count) continue;
      float* p = score + r * SCORE_PITCH + static_cast<size_t>(s->slot) * W;
      weigh<P>(p, s->rows, s->width, highest, sums);
    }
    F so_far = simd::load(total[r]);
    if (!simd::all_equal(so_far, simd::zero()) && !simd::all_equal(before, now)) {
      float factor[W];
      const F f = simd::exp2(simd::finite(before) - highest);
      simd::store(factor, f);
      so_far = so_far * f;
      float* row = sum + static_cast<size_t>(r) * W * pitch;
      for (int l = 0; l < W; l++) {
        for (int c = 0; c < pitch; c += W, row += W)
          simd::store(row, simd::load(row) * simd::set1(factor[l]));
      }
    }
    simd::store(total[r], so_far + (sums[0] + sums[1]));
    simd::store(top[r], now);
  }
}

template <class T>
static void forward_tile(const Problem& p, const ForwardTensors& t, const TilePlace& place,
                         const ForwardKeys<T>& ring, const Bias& bias, const Lanes& shared,
                         bool stream, Prefetch& prefetch, ForwardScratch<T>& scratch) {
  using P = Products<T>;
  const int rows = place.tile.rows, dim = static_cast<int>(p.dim), steps = simd::steps<P>(dim),
            value_dim = static_cast<int>(p.value_dim);
  const float scale = static_cast<float>(p.scale) * LOG2E;
  const int pitch = round_up(value_dim, W);
  float* query = scratch.query.get(static_cast<size_t>(MAX_ROWS) * W * dim);
  float* score = scratch.score.get(MAX_ROWS * SCORE_PITCH);
  float* sum = scratch.sum.get(static_cast<size_t>(MAX_ROWS) * W * pitch);
  for (int r = 0; r < rows; r++) {
    load_query_columns<T, P>(place, t.query, r, dim, scale,
                             query + static_cast<size_t>(r) * W * steps);
  }
  if (!stream) add_rows<T>(prefetch, place, t.out, value_dim);
  float top[MAX_ROWS][W], total[MAX_ROWS][W] = {};
  std::fill(&top[0][0], &top[0][0] + MAX_ROWS * W, -INFINITY);

  const Additional *more_keys = nullptr, *more_values = nullptr;
  if (p.additional) {
    more_keys = &scratch.additional_keys[place.kv_slot];
    more_values = &scratch.additional_values[place.kv_slot];
  }
  const SeenKeys<ForwardKeys<T>> keys{ring, scratch.keys, place, shared, more_keys};
  const SeenKeys<ForwardKeys<T>> values{ring, scratch.values, place, shared, more_values};
  bool fresh = true;
  scratch.plan.for_each_block([&](const Slice* first, const Slice* last) {
    for (const Slice* s = first; s < last; s++) {
      keys.score(*s, scale, query, score, prefetch);
      if (bias) add_bias(bias, place, *s, score);
    }
    online_softmax<P>(first, last, place, shared, score, top, total, sum, pitch);
    for_each_group(first, last, [&](const SliceGroup& group) {
      values.mix(group, score, sum, fresh, prefetch);
      fresh = false;
    });
  });

  float factor[MAX_ROWS][W];
  for (int r = 0; r < rows; r++) {
    const F highest = simd::load(top[r]), denominator = simd::load(total[r]);
    // Like softmax: NaN if the highest score is infinite.
    simd::store(factor[r], simd::set1(1.f) / denominator + (highest - highest));
    if (!t.lse.data) continue;
    float lse[W];
    // Like logsumexp: infinite if the highest score is, NaN if any score is NaN, which log2 does
    // not propagate.
    const F log = simd::log2(denominator) + (denominator - denominator);
    simd::store(lse, (highest + log) * simd::set1(LN2));
    float* lse_line = place.line<float>(t.lse, r);
    for (int l = 0; l < place.lanes.valid; l++) lse_line[place.order()[l] * t.lse.x] = lse[l];
  }
  store_sums<T>(place, t.out, value_dim, sum, factor, stream);
}

template <class T>
static void forward(const Problem& p, const ForwardTensors& t) {
  const Layout layout(p, false);
  const Bias bias(p, t.rpb, LOG2E);
  const Lanes shared = make_shared_lanes(static_cast<int>(p.additional));
  const int64_t positions = p.batch * p.size[0] * p.size[1] * p.size[2];
  const bool stream =
      static_cast<int64_t>(sizeof(T)) * positions * p.heads * p.value_dim > STREAMED_BYTES &&
      fills_lines<T>(t.out, static_cast<int>(p.value_dim));
  parallel::for_each_in_turn(layout.items(p), layout.threads(p), [&](int64_t index) {
    static thread_local ForwardScratch<T> scratch;
    const WorkItem item(p, layout, index);
    scratch.keys.set(t.key, p.dim, false, true);
    scratch.values.set(t.value, p.value_dim, true, false);
    ForwardKeys<T> ring(layout, item.segment, item.batch, item.first_head, item.heads,
                        {&scratch.keys, &scratch.values});
    scratch.pack_additional(p, item, t.additional_key, t.additional_value);
    const auto next = [&](const TilePlace& place, Prefetch& prefetch) {
      add_rows<T>(prefetch, place, t.query, p.dim);
    };
    const auto body = [&](const TilePlace& place, Prefetch& prefetch) {
      forward_tile<T>(p, t, place, ring, bias, shared, stream, prefetch, scratch);
    };
    for_each_tile(p, layout, item, ring, scratch, next, body);
    if (stream) simd::end_streams();
  });
}

}  // namespace na
