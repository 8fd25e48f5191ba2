// Backward in one pass over the queries. Probabilities are recomputed from lse. Each tile
// accumulates its dQ in scratch and adds its contribution to dK and dV to rows owned by the work
// item. Where items overlap, their shares are then added in a fixed order, so there are no atomics,
// and the result depends neither on timing nor on the number of threads. (A second, key-centric
// pass over inverse windows would need seven products; this needs five.)
#pragma once
#include "neighborhood/key_gradients.h"
#include "common/lanes.h"

namespace na {

struct BackwardTensors {
  Tensor query, key, value, additional_key, additional_value;
  const float* rpb;
  Tensor out, lse, grad_out, grad_lse;  // grad_lse.data may be null
  Tensor grad_query, grad_key, grad_value, grad_additional_key, grad_additional_value;
  float* grad_rpb;
};

// Rows are multiplied by gradients, which are not rounded to bfloat16.
template <class T>
using BackwardKeys = KeyRing<T, Floats, Products<T>>;

template <class T>
struct BackwardScratch : ItemScratch<BackwardKeys<T>> {
  GradientRing<T> grad_keys, grad_values;
  Buffer query_rows, query, grad_rows, grad, score, grad_score, sum, bias_lanes;
};

// score -> p, grad_score -> ds = p (dp - delta), for the query rows and keys of one slice.
static void softmax_backward(const Slice& s, const Lanes& lanes, const float (*lse)[W],
                             const float (*delta)[W], float* score, float* grad_score) {
  const int n = s.rows * s.width;
  for (int r = s.row; r < s.row + s.row_count; r++) {
    const F l = simd::load(lse[r]), d = simd::load(delta[r]);
    float* p = score + r * SCORE_PITCH + static_cast<size_t>(s.slot) * W;
    float* g = grad_score + r * SCORE_PITCH + static_cast<size_t>(s.slot) * W;
    for (int i = 0; i < n; i++, p += W, g += W) {
      const F x = simd::exp2(simd::load(p) - l);
      simd::store(p, x);
      simd::store(g, x * (simd::load(g) - d));
    }
    if (lanes.ragged) {  // keys outside a lane's window must not affect the bias
      g -= static_cast<size_t>(n) * W;
      for (int i = 0; i < n; i++, g += W) {
        simd::store(
            g, simd::keep_below(simd::load(g), lanes.count, s.offset + i % s.width, simd::zero()));
      }
    }
  }
}

// sums[rpb][lane] += ds; each lane has its own column, so that lanes never collide.
static void add_bias_gradient(const Bias& bias, const TilePlace& place, const Slice& s,
                              const float* grad_score, float* sums) {
  if (s.plane < 0) return;
  const Lanes& lanes = place.lanes;
  for (int r = s.row; r < s.row + s.row_count; r++) {
    const float* g = grad_score + r * SCORE_PITCH + static_cast<size_t>(s.slot) * W;
    for (int y = 0; y < s.rows; y++) {
      float* line = sums + bias_index(bias, place, s, s.key_row + y, r, bias.columns) * W;
      for (int k = 0; k < s.width; k++, g += W, line += W) {
        if (lanes.bias_uniform && lanes.valid == W && !lanes.ragged) {
          simd::store(line, simd::load(line) + simd::load(g));
        } else {
          for (int l = 0; l < lanes.valid; l++) {
            if (s.offset + k < lanes.count[l]) line[lanes.bias[l] * W + l] += g[l];
          }
        }
      }
    }
  }
}

// delta = sum over channels of out . grad_out, for each query of a row; `grad` is [lane][channel].
template <class T>
static F row_delta(const TilePlace& place, const Tensor& out, int row, int channels,
                   const float* grad) {
  const int pitch = round_up(channels, W), valid = place.lanes.valid;
  const T* line = place.line<const T>(out, row);
  float products[W][W], columns[W][W];
  for (int l = 0; l < valid; l++) {
    const T* o = line + place.order()[l] * out.x;
    const float* g = grad + static_cast<size_t>(l) * pitch;
    F sum = simd::zero();
    for (int c = 0; c < channels; c += W)
      sum = simd::fma(simd::get(o + c, std::min(W, channels - c)), simd::load(g + c), sum);
    simd::store(products[l], sum);
  }
  for (int l = valid; l < W; l++) std::memcpy(products[l], products[valid - 1], sizeof *products);
  simd::transpose(products[0], W, columns[0], W, W);
  F sum = simd::load(columns[0]);
  for (int l = 1; l < W; l++) sum = sum + simd::load(columns[l]);
  return sum;
}

template <class T>
static void backward_tile(const Problem& p, const BackwardTensors& t, const TilePlace& place,
                          const BackwardKeys<T>& ring, const WorkItem& item, const Bias& bias,
                          const Lanes& shared, Prefetch& prefetch, BackwardScratch<T>& scratch,
                          KeyGradients& grads, bool large) {
  using P = Products<T>;
  const int rows = place.tile.rows, dim = static_cast<int>(p.dim),
            value_dim = static_cast<int>(p.value_dim);
  const int pitch = round_up(dim, W), value_pitch = round_up(value_dim, W);
  const int steps = simd::steps<P>(dim), value_steps = simd::steps<P>(value_dim);
  const float scale = static_cast<float>(p.scale);
  float* query_rows = scratch.query_rows.get(static_cast<size_t>(MAX_ROWS) * W * pitch);
  float* query = scratch.query.get(static_cast<size_t>(MAX_ROWS) * W * dim);
  float* grad_rows = scratch.grad_rows.get(static_cast<size_t>(MAX_ROWS) * W * value_pitch);
  float* grad = scratch.grad.get(static_cast<size_t>(MAX_ROWS) * W * value_dim);
  float* score = scratch.score.get(MAX_ROWS * SCORE_PITCH);
  float* grad_score = scratch.grad_score.get(MAX_ROWS * SCORE_PITCH);
  float* sum = scratch.sum.get(static_cast<size_t>(MAX_ROWS) * W * pitch);

  if (!large) add_rows<T>(prefetch, place, t.grad_query, dim);
  prefetch.set_portions(2 * (place.tile.high - place.tile.low) + place.lanes.valid / 2 +
                     2 * (place.lanes.last - place.lanes.base));
  float lse[MAX_ROWS][W], delta[MAX_ROWS][W];
  for (int r = 0; r < rows; r++) {
    float* q = query_rows + static_cast<size_t>(r) * W * pitch;
    float* g = grad_rows + static_cast<size_t>(r) * W * value_pitch;
    load_queries<T>(place, t.query, r, dim, scale * LOG2E, q);
    load_query_columns<T, P>(place, t.query, r, dim, scale * LOG2E,
                             query + static_cast<size_t>(r) * W * steps);
    load_queries<T>(place, t.grad_out, r, value_dim, 1.f, g);
    load_query_columns<T, P>(place, t.grad_out, r, value_dim, 1.f,
                             grad + static_cast<size_t>(r) * W * value_steps);
    simd::store(delta[r], row_delta<T>(place, t.out, r, value_dim, g));
    load_lanes(place, t.lse, r, lse[r]);
    simd::store(lse[r], simd::load(lse[r]) * simd::set1(LOG2E));
    if (t.grad_lse.data) {
      float grad_lse[W];
      load_lanes(place, t.grad_lse, r, grad_lse);
      simd::store(delta[r], simd::load(delta[r]) - simd::load(grad_lse));
    }
  }

  const int slot = place.kv_slot;
  const Additional *more_keys = nullptr, *more_values = nullptr;
  if (p.additional) {
    more_keys = &scratch.additional_keys[slot];
    more_values = &scratch.additional_values[slot];
  }
  const SeenKeys<BackwardKeys<T>> keys{ring, scratch.keys, place, shared, more_keys};
  const SeenKeys<BackwardKeys<T>> values{ring, scratch.values, place, shared, more_values};
  bool fresh = true;
  scratch.plan.for_each_block([&](const Slice* first, const Slice* last) {
    for (const Slice* s = first; s < last; s++) {
      keys.score(*s, scale * LOG2E, query, score, prefetch);
      if (bias) add_bias(bias, place, *s, score);
      values.score(*s, 1.f, grad, grad_score, prefetch);
      softmax_backward(*s, s->plane < 0 ? shared : place.lanes, lse, delta, score, grad_score);
      clear_unseen(*s, rows, score);
      clear_unseen(*s, rows, grad_score);
      if (t.grad_rpb) {
        const size_t head = place.head - item.first_head * (p.heads / p.kv_heads);
        add_bias_gradient(bias, place, *s, grad_score,
                          scratch.bias_lanes.data() + head * bias.per_head() * W);
      }
    }
    for_each_group(first, last, [&](const SliceGroup& group) {
      const bool is_more = group.first->plane < 0;
      const auto add = [&](const GradientRing<T>& sums, const Buffer& more, int channel_pitch,
                           const float* weight, const float* queries) {
        Scatter(group, is_more ? shared : place.lanes, place.lanes.valid, is_more ? 0 : ring.low(),
                channel_pitch, weight, queries, [&](const Slice& s, int y) {
                  return is_more ? more.data() : sums.row(slot, s.plane, s.key_row + y);
                })
            .run(prefetch);
      };
      keys.mix(group, grad_score, sum, fresh, prefetch);
      add(scratch.grad_keys, grads.additional_keys, pitch, grad_score, query_rows);
      add(scratch.grad_values, grads.additional_values, value_pitch, score, grad_rows);
      fresh = false;
    });
  });
  float factor[MAX_ROWS][W];
  std::fill_n(factor[0], MAX_ROWS * W, scale);
  store_sums<T>(place, t.grad_query, dim, sum, factor, large && fills_lines<T>(t.grad_query, dim));
}

template <class T>
static void backward(const Problem& p, const BackwardTensors& t) {
  const Layout layout(p, true);
  const Bias bias(p, t.rpb, LOG2E);
  const int groups = static_cast<int>(p.heads / p.kv_heads),
            additional = static_cast<int>(p.additional);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int pitch = round_up(dim, W), value_pitch = round_up(value_dim, W);
  const Lanes shared = make_shared_lanes(additional);
  // The size of the three gradients together.
  const bool large = static_cast<int64_t>(sizeof(T)) * p.batch * p.size[0] * p.size[1] * p.size[2] *
                         (p.heads * p.dim + p.kv_heads * (p.dim + p.value_dim)) >
                     STREAMED_BYTES;
  const int per_head = layout.items_per_head;
  const size_t bias_size = t.grad_rpb ? groups * bias.per_head() : 0;
  std::fill(t.grad_rpb, t.grad_rpb + p.kv_heads * bias_size, 0.f);

  const auto run_unit = [&](int64_t index, KeyGradients* block_shares) {
    static thread_local BackwardScratch<T> scratch;
    const WorkItem item(p, layout, index);
    scratch.keys.set(t.key, dim, true, true);
    scratch.values.set(t.value, value_dim, false, true);
    BackwardKeys<T> ring(layout, item.segment, item.batch, item.first_head, item.heads,
                         {&scratch.keys, &scratch.values});
    scratch.pack_additional(p, item, t.additional_key, t.additional_value);
    const auto share = [&](int h) -> KeyGradients& {
      return block_shares[h * per_head + item.index];
    };
    const auto key_share = [&](int h) { return share(h).keys.data(); };
    const auto value_share = [&](int h) { return share(h).values.data(); };
    const size_t shared_keys = item.shared_keys();
    for (int h = 0; h < item.heads; h++) {
      KeyGradients& g = share(h);
      g.keys.get(shared_keys * pitch);
      g.values.get(shared_keys * value_pitch);
      zeroed(g.additional_keys, static_cast<size_t>(additional) * pitch);
      zeroed(g.additional_values, static_cast<size_t>(additional) * value_pitch);
    }
    scratch.grad_keys.start(item, t.grad_key, dim, LN2, large);
    scratch.grad_values.start(item, t.grad_value, value_dim, 1.f, large);
    zeroed(scratch.bias_lanes, item.heads * bias_size * W);
    const auto next = [&](const TilePlace& place, Prefetch& prefetch) {
      add_rows<T>(prefetch, place, t.query, dim);
      add_rows<T>(prefetch, place, t.grad_out, value_dim);
      add_rows<T>(prefetch, place, t.out, value_dim);
      if (place.head % groups) return;
      scratch.grad_keys.add_leaving(prefetch, place.kv_slot, place.z, place.tile.low);
      scratch.grad_values.add_leaving(prefetch, place.kv_slot, place.z, place.tile.low);
    };
    const auto body = [&](const TilePlace& place, Prefetch& prefetch) {
      scratch.grad_keys.advance(place.tile.low, place.tile.high, key_share);
      scratch.grad_values.advance(place.tile.low, place.tile.high, value_share);
      backward_tile<T>(p, t, place, ring, item, bias, shared, prefetch, scratch, share(place.kv_slot),
                       large);
    };
    for_each_tile(p, layout, item, ring, scratch, next, body);
    scratch.grad_keys.finish(key_share);
    scratch.grad_values.finish(value_share);
    if (large) simd::end_streams();
    for (int h = 0; bias_size && h < item.heads; h++) {
      float* sums = share(h).bias.get(bias_size);
      const float* lanes = scratch.bias_lanes.data() + h * bias_size * W;
      for (size_t i = 0; i < bias_size; i++) sums[i] = simd::reduce_add(simd::load(lanes + i * W));
    }
  };
  const auto store_head = [&](int b, int h, const KeyGradients* g) {
    store_key_gradient<T>(layout, t.grad_key, b, h, dim, LN2,
                          [&](int u) { return g[u].keys.data(); });
    store_key_gradient<T>(layout, t.grad_value, b, h, value_dim, 1.f,
                          [&](int u) { return g[u].values.data(); });
    store_additional_gradient<T>(t.grad_additional_key, additional, per_head, b, h, dim, LN2,
                                 [&](int u) { return g[u].additional_keys.data(); });
    store_additional_gradient<T>(t.grad_additional_value, additional, per_head, b, h, value_dim,
                                 1.f, [&](int u) { return g[u].additional_values.data(); });
  };

  const auto sum_bias = [&](int h, const KeyGradients* g) {
    float* out = t.grad_rpb + h * bias_size;
    for (int u = 0; bias_size && u < per_head; u++) {
      for (size_t k = 0; k < bias_size; k++) out[k] += g[u].bias.data()[k];
    }
  };
  accumulate(p, layout, run_unit, store_head, sum_bias);
}

}  // namespace na
