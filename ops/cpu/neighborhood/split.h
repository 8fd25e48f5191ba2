// Neighborhood attention without its softmax: scores, weighted sums of keys (or values), and the
// transpose of the latter. Each is the gradient of the others. The weights of a query's window are
// contiguous in the caller's tensors; tiles have them in the lanes of the score buffer.
#pragma once
#include "neighborhood/forward.h"
#include "neighborhood/key_gradients.h"
#include "neighborhood/narrow.h"

namespace na {

// The scores are weights = query . key; the sums of keys are query = sum of weights * key; those of
// queries are key = sum of weights * query. `dim` is the number of channels of queries and keys.
struct SplitTensors {
  Tensor query, key, weights;
  const float* rpb;
  double fill;  // the score of a key that a causal window lacks
};

template <class T>
using SplitKeys = KeyRing<T, Products<T>, Products<T>>;

template <class T>
struct SplitScratch : ItemScratch<SplitKeys<T>> {
  GradientRing<T> sums_of_queries;
  Buffer query, weights, sum;
};

// One more vector of lanes per row of the transposes below.
static inline float* weights_buffer(Buffer& b) { return b.get(MAX_ROWS * SCORE_PITCH + W * W); }

static inline int64_t window_keys(const Problem& p) {
  return p.kernel[0] * p.kernel[1] * p.kernel[2];
}

// Calls body(slot, keys, index) for the runs of keys of one query row that are adjacent both in the
// score buffer, from `slot`, and in the window, from `index`.
template <class Body>
static void for_each_run(const Problem& p, const TilePlace& place, const Slice* first,
                         const Slice* last, int row, const Body& body) {
  const Axis &z = place.layout.z, &y = place.layout.y;
  const int low_z = z.start[place.z], low_y = y.start[place.tile.first + row];
  int slot = 0, keys = 0, index = 0;
  for (const Slice* s = first; s < last; s++) {
    if (row < s->row || row >= s->row + s->row_count) continue;
    for (int i = 0; i < s->rows; i++) {
      const int from = s->slot + i * s->width;
      const auto line = (s->plane - low_z) * p.kernel[1] + (s->key_row + i - low_y);
      const int at = static_cast<int>(line * p.kernel[2]) + s->offset;
      if (keys && (from != slot + keys || at != index + keys)) {
        body(slot, keys, index);
        keys = 0;
      }
      if (!keys) {
        slot = from;
        index = at;
      }
      keys += s->width;
    }
  }
  if (keys) body(slot, keys, index);
}

// [key][lane] -> the caller's weights, from `out` on for the query at order[0] = 0.
template <class T>
static void store_weights(const float* weights, int keys, const TilePlace& place, int64_t stride,
                          T* out) {
  const int count = std::min(keys, W);
  for (int k = 0; k < keys; k += W) {
    const int first = std::min(k, keys - count);  // the last vectors overlap
    F lanes[W];
    const float* rows[W];
    for (int i = 0; i < W; i++) rows[i] = weights + static_cast<size_t>(first + i) * W;
    simd::transpose(rows, lanes);
    for (int l = 0; l < place.lanes.valid; l++)
      simd::put(out + place.order()[l] * stride + first, lanes[l], count);
  }
}

// The caller's weights -> [key][lane]; unused lanes repeat the last one.
template <class T>
static void load_weights(const T* in, int64_t stride, const TilePlace& place, int keys,
                         float* weights) {
  const int count = std::min(keys, W);
  for (int k = 0; k < keys; k += W) {
    const int first = std::min(k, keys - count);
    const float* rows[W];
    float tile[W][W];
    for (int l = 0; l < W; l++) {
      const T* from = in + place.order()[std::min(l, place.lanes.valid - 1)] * stride + first;
      if constexpr (std::is_same_v<T, float>) {
        if (count == W) {
          rows[l] = from;
          continue;
        }
      }
      simd::store(tile[l], simd::get(from, count));
      rows[l] = tile[l];
    }
    simd::transpose(rows, weights + static_cast<size_t>(first) * W, W, count);
  }
}

// Loads the weights of a block of slices.
template <class T>
static void load_block(const Problem& p, const SplitTensors& t, const TilePlace& place,
                       const Slice* first, const Slice* last, float* weights) {
  for (int r = 0; r < place.tile.rows; r++) {
    const T* line = place.line<const T>(t.weights, r);
    for_each_run(p, place, first, last, r, [&](int slot, int keys, int index) {
      load_weights(line + index, t.weights.x, place, keys,
                   weights + r * SCORE_PITCH + static_cast<size_t>(slot) * W);
    });
  }
}

// Stores the scores of a block of slices.
template <class T>
static void store_block(const Problem& p, const SplitTensors& t, const TilePlace& place,
                        const Slice* first, const Slice* last, float* scores) {
  const Lanes& lanes = place.lanes;
  for (int r = 0; r < place.tile.rows; r++) {
    float* score = scores + r * SCORE_PITCH;
    for (const Slice* s = first; s < last && lanes.ragged; s++) {
      float* at = score + static_cast<size_t>(s->slot) * W;
      for (int i = 0; i < s->rows * s->width; i++, at += W) {
        const F fill = simd::set1(static_cast<float>(t.fill));
        simd::store(at, simd::keep_below(simd::load(at), lanes.count, s->offset + i % s->width,
                                         fill));
      }
    }
    T* line = place.line<T>(t.weights, r);
    for_each_run(p, place, first, last, r, [&](int slot, int keys, int index) {
      store_weights(score + static_cast<size_t>(slot) * W, keys, place, t.weights.x, line + index);
    });
  }
}

// Fills the windows of a tile's query rows that lack keys.
template <class T>
static void fill_windows(const Problem& p, const SplitTensors& t, const TilePlace& place) {
  const Axis &z = place.layout.z, &y = place.layout.y;
  const bool full = z.count[place.z] == p.kernel[0] && place.lanes.width == p.kernel[2];
  for (int r = 0; r < place.tile.rows; r++) {
    if (full && y.count[place.tile.first + r] == p.kernel[1]) continue;
    T* line = place.line<T>(t.weights, r);
    for (int l = 0; l < place.lanes.valid; l++) {
      T* out = line + place.order()[l] * t.weights.x;
      for (int64_t i = 0; i < window_keys(p); i++)
        simd::assign(out + i, static_cast<float>(t.fill));
    }
  }
}

// Packs the weights of the slices in pairs, at the start of each key row.
template <class P>
static void pack_pairs(const Slice* first, const Slice* last, float* weights) {
  for (const Slice* s = first; s < last; s++) {
    for (int r = s->row; r < s->row + s->row_count; r++) {
      for (int i = 0; i < s->rows; i++) {
        float* row = weights + r * SCORE_PITCH + static_cast<size_t>(s->slot + i * s->width) * W;
        for (int k = 0; k < s->width; k += 2) {
          const F second = k + 1 < s->width ? simd::load(row + (k + 1) * W) : simd::zero();
          simd::store(row + k / 2 * W, P::pack(simd::load(row + k * W), second));
        }
      }
    }
  }
}

// Calls body(place, ring, prefetch, scratch) for every tile of queries, with the keys in the ring.
// With `rows`, they are packed as rows, else as columns.
template <class T, class Body>
static void for_each_split_tile(const Problem& p, const SplitTensors& t, bool rows,
                                const Body& body) {
  const Layout layout(p, false);
  parallel::for_each_in_turn(layout.items(p), layout.threads(p), [&](int64_t index) {
    static thread_local SplitScratch<T> scratch;
    const WorkItem item(p, layout, index);
    scratch.keys.set(t.key, p.dim, rows, !rows);
    SplitKeys<T> ring(layout, item.segment, item.batch, item.first_head, item.heads,
                      {&scratch.keys});
    const auto next = [&](const TilePlace& place, Prefetch& prefetch) {
      if (rows) {
        add_rows<T>(prefetch, place, t.weights, window_keys(p));
      } else {
        add_rows<T>(prefetch, place, t.query, p.dim);
      }
    };
    for_each_tile(p, layout, item, ring, scratch, next,
                  [&](const TilePlace& place, Prefetch& prefetch) {
                    body(place, ring, prefetch, scratch);
                  });
  });
}

template <class T>
static void scores(const Problem& p, const SplitTensors& t) {
  using P = Products<T>;
  const int dim = static_cast<int>(p.dim), steps = simd::steps<P>(dim);
  const Bias bias(p, t.rpb, 1.f);
  for_each_split_tile<T>(p, t, false, [&](const TilePlace& place, const SplitKeys<T>& ring,
                                          Prefetch& prefetch, SplitScratch<T>& scratch) {
    float* query = scratch.query.get(static_cast<size_t>(MAX_ROWS) * W * dim);
    float* score = weights_buffer(scratch.weights);
    for (int r = 0; r < place.tile.rows; r++) {
      load_query_columns<T, P>(place, t.query, r, dim, 1.f,
                               query + static_cast<size_t>(r) * W * steps);
    }
    fill_windows<T>(p, t, place);
    const SeenKeys<SplitKeys<T>> keys{ring, scratch.keys, place, place.lanes, nullptr};
    scratch.plan.for_each_block([&](const Slice* first, const Slice* last) {
      for (const Slice* s = first; s < last; s++) {
        keys.score(*s, 1.f, query, score, prefetch);
        if (bias) add_bias(bias, place, *s, score);
      }
      store_block<T>(p, t, place, first, last, score);
    });
  });
}

template <class T>
static void mix(const Problem& p, const SplitTensors& t) {
  if (is_narrow(p)) return mix_narrow<T>(p, t.query, t.key, t.weights);
  using P = Products<T>;
  const int dim = static_cast<int>(p.dim), pitch = round_up(dim, W);
  for_each_split_tile<T>(p, t, true, [&](const TilePlace& place, const SplitKeys<T>& ring,
                                         Prefetch& prefetch, SplitScratch<T>& scratch) {
    float* weights = weights_buffer(scratch.weights);
    float* sum = scratch.sum.get(static_cast<size_t>(MAX_ROWS) * W * pitch);
    add_rows<T>(prefetch, place, t.query, dim);
    const SeenKeys<SplitKeys<T>> keys{ring, scratch.keys, place, place.lanes, nullptr};
    bool fresh = true;
    scratch.plan.for_each_block([&](const Slice* first, const Slice* last) {
      load_block<T>(p, t, place, first, last, weights);
      if constexpr (P::COUNT == 2) pack_pairs<P>(first, last, weights);
      for_each_group(first, last, [&](const SliceGroup& group) {
        keys.mix(group, weights, sum, fresh, prefetch);
        fresh = false;
      });
    });
    float factor[MAX_ROWS][W];
    std::fill_n(factor[0], MAX_ROWS * W, 1.f);
    store_sums<T>(place, t.query, dim, sum, factor, false);
  });
}

template <class T>
static void scatter(const Problem& p, const SplitTensors& t) {
  const Layout layout(p, true);
  const int dim = static_cast<int>(p.dim), pitch = round_up(dim, W), per_head = layout.items_per_head;
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * p.batch * p.heads * p.dim * p.size[0] *
                        p.size[1] * p.size[2];
  const bool large = bytes > STREAMED_BYTES;
  const auto run_item = [&](int64_t index, KeyGradients* shares) {
    static thread_local SplitScratch<T> scratch;
    const WorkItem item(p, layout, index);
    SplitKeys<T> ring(layout, item.segment, item.batch, item.first_head, item.heads, {});
    const auto share = [&](int h) { return shares[h * per_head + item.index].keys.data(); };
    for (int h = 0; h < item.heads; h++)
      shares[h * per_head + item.index].keys.get(item.shared_keys() * pitch);
    GradientRing<T>& sums = scratch.sums_of_queries;
    sums.start(item, t.key, dim, 1.f, large);
    const auto next = [&](const TilePlace& place, Prefetch& prefetch) {
      add_rows<T>(prefetch, place, t.query, dim);
      add_rows<T>(prefetch, place, t.weights, window_keys(p));
      sums.add_leaving(prefetch, place.kv_slot, place.z, place.tile.low);
    };
    const auto body = [&](const TilePlace& place, Prefetch& prefetch) {
      sums.advance(place.tile.low, place.tile.high, share);
      const int rows = place.tile.rows;
      float* weights = weights_buffer(scratch.weights);
      float* query = scratch.query.get(static_cast<size_t>(MAX_ROWS) * W * pitch);
      for (int r = 0; r < rows; r++)
        load_queries<T>(place, t.query, r, dim, 1.f, query + static_cast<size_t>(r) * W * pitch);
      scratch.plan.for_each_block([&](const Slice* first, const Slice* last) {
        load_block<T>(p, t, place, first, last, weights);
        for (const Slice* s = first; s < last; s++) clear_unseen(*s, rows, weights);
        for_each_group(first, last, [&](const SliceGroup& group) {
          Scatter(group, place.lanes, place.lanes.valid, item.segment.low, pitch, weights, query,
                  [&](const Slice& s, int y) {
                    return sums.row(place.kv_slot, s.plane, s.key_row + y);
                  })
              .run(prefetch);
        });
      });
    };
    for_each_tile(p, layout, item, ring, scratch, next, body);
    sums.finish(share);
    if (large) simd::end_streams();
  };
  const auto store_head = [&](int b, int h, const KeyGradients* g) {
    store_key_gradient<T>(layout, t.key, b, h, dim, 1.f, [&](int u) { return g[u].keys.data(); });
  };
  accumulate(p, layout, run_item, store_head, [](int, const KeyGradients*) {});
}

}  // namespace na
