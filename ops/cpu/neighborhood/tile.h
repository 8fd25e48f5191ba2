// Code shared by forward and backward: a tile of up to MAX_ROWS x W queries, and the three products
// applied to a slice of keys.
#pragma once
#include "neighborhood/microkernels.h"
#include "neighborhood/problem.h"

namespace na {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// Distance between the scores of two query rows; the extra vector puts rows in different cache
// sets.
constexpr size_t SCORE_PITCH = (BLOCK_KEYS + 1) * W;

// The queries of one tile, and their positions in the caller's tensors.
struct TilePlace {
  const Layout& layout;
  const RowTile& tile;
  const Lanes& lanes;
  int batch, z, head;
  int kv_slot;  // its key head, counted from the item's first

  template <class T>
  T* line(const Tensor& t, int row) const {
    return static_cast<T*>(t.data) +
           t.at(batch, layout.z.order[z], layout.y.order[tile.first + row], head);
  }
  const int* order() const { return layout.x.order.data() + lanes.first; }
};

// Prefetches memory in small portions while the current tile is computed. Heads are interleaved,
// which defeats the hardware prefetcher.
class Prefetch {
 public:
  // The lines are prefetched in `portions` calls of `fetch`.
  Prefetch(const int* order, int positions, int portions)
      : order_(order), positions_(positions), portions_(portions) {}
  void set_portions(int portions) { portions_ = portions; }

  // Adds `channels` at each position of the row that starts at `line`.
  template <class T>
  void add(const T* line, int64_t stride, int64_t channels) {
    if (count_ == MAX_LINES) return;
    lines_[count_++] = {reinterpret_cast<const char*>(line), stride * int64_t{sizeof(T)},
                        channels * sizeof(T)};
  }
  void fetch() {
    if (!portion_) portion_ = (positions_ * count_ + portions_ - 1) / portions_;
    for (int left = portion_; left > 0 && line_ < count_;) {
      const Line& line = lines_[line_];
      const int end = std::min(positions_, position_ + left);
      left -= end - position_;
      for (; position_ < end; position_++) {
        const char* p = line.start + order_[position_] * line.stride;
        for (size_t b = 0; b < line.bytes; b += CACHE_LINE) __builtin_prefetch(p + b, 0, 2);
      }
      if (position_ == positions_) {
        position_ = 0;
        line_++;
      }
    }
  }

 private:
  static constexpr int MAX_LINES = 24;
  struct Line {
    const char* start;
    int64_t stride;
    size_t bytes;
  };
  Line lines_[MAX_LINES];
  int count_ = 0;
  const int* order_;
  int positions_, portions_;
  int portion_ = 0;              // positions x lines per call
  int line_ = 0, position_ = 0;  // the next ones; neighbours are in the same memory page
};

// Loads a row of queries as [lane][channel]; unused lanes repeat the last one.
template <class T>
static void load_queries(const TilePlace& place, const Tensor& t, int row, int channels,
                         float scale, float* rows) {
  const int pitch = round_up(channels, W), valid = place.lanes.valid;
  pack_rows<Floats>(place.line<const T>(t, row), t.x, place.order(), valid, channels, scale, rows);
  const float* last = rows + static_cast<size_t>(valid - 1) * pitch;
  for (int l = valid; l < W; l++)
    std::memcpy(rows + static_cast<size_t>(l) * pitch, last, pitch * sizeof(float));
}

// Loads a row of queries as [step][lane] of P, Floats times `scale`; unused lanes repeat the last
// one.
template <class T, class P>
static void load_query_columns(const TilePlace& place, const Tensor& t, int row, int channels,
                               float scale, float* columns) {
  pack_columns<P>(place.line<const T>(t, row), t.x, place.order(), place.lanes.valid, channels,
                  scale, columns, W);
}

// Stores the sums of a tile, [row][lane][channel], times factors.
template <class T>
static void store_sums(const TilePlace& place, const Tensor& t, int channels, const float* sum,
                       const float (*factor)[W], bool stream) {
  for (int r = 0; r < place.tile.rows; r++) {
    T* line = place.line<T>(t, r);
    for (int l = 0; l < place.lanes.valid; l++) {
      store_channels(sum + static_cast<size_t>(r * W + l) * round_up(channels, W), channels,
                     factor[r][l], line + place.order()[l] * t.x, stream);
    }
  }
}

// Prefetches the rows of a tile that are loaded or stored soon.
template <class T>
static void add_rows(Prefetch& prefetch, const TilePlace& place, const Tensor& t, int64_t channels) {
  for (int r = 0; r < place.tile.rows; r++) prefetch.add(place.line<const T>(t, r), t.x, channels);
}

// Loads one number per query of a row; unused lanes repeat the last one.
static inline void load_lanes(const TilePlace& place, const Tensor& t, int row, float* out) {
  const float* line = place.line<const float>(t, row);
  for (int l = 0; l < W; l++)
    out[l] = line[place.order()[std::min(l, place.lanes.valid - 1)] * t.x];
}

// Computes scores of the slice's keys. `query` is [row][step][lane] of the whole tile;
// columns_of(i) is the slice's i-th key row, [step][position] from column `low`; `scale` is used
// for Pairs.
template <class P, class ColumnsOf>
static void score_slice(const Slice& s, const Lanes& lanes, int low, int steps, float scale,
                        size_t column_pitch, const float* query, float* score, Prefetch& prefetch,
                        const ColumnsOf& columns_of) {
  const int parts = (s.width + MAX_KEYS - 1) / MAX_KEYS, step = (s.width + parts - 1) / parts;
  ScoreArgs a;
  a.query = query + static_cast<size_t>(s.row) * steps * W;
  a.steps = steps;
  a.scale = scale;
  a.pitch = column_pitch;
  a.offset = lanes.offset;
  a.score_pitch = SCORE_PITCH;
  const auto& kernels = SCORE<P>[lanes.fetch][s.row_count - 1];
  for (int y = 0; y < s.rows; y++) {
    const float* column = columns_of(y) + (lanes.base + s.offset - low);
    float* out = score + s.row * SCORE_PITCH + static_cast<size_t>(s.slot + y * s.width) * W;
    for (int k = 0; k < s.width; k += step) {
      a.column = column + k;
      a.score = out + k * W;
      kernels[std::min(step, s.width - k) - 1](a);
    }
    prefetch.fetch();
  }
}

// Slices [first, last) of one block that are adjacent in the score buffer and share lanes and
// offsets.
struct SliceGroup {
  const Slice* first;
  const Slice* last;
};

// Calls body(group) for the groups of a block; the additional keys are a separate group.
template <class Body>
static void for_each_group(const Slice* first, const Slice* last, const Body& body) {
  while (first < last) {
    const Slice* end = first + 1;
    while (end < last && (end->plane < 0) == (first->plane < 0) && end->offset == first->offset &&
           end->width == first->width) {
      end++;
    }
    body(SliceGroup{first, end});
    first = end;
  }
}

// sum[row][lane][channel] += weight * keys. rows_of(slice, i) is the slice's i-th key row, from
// column `low`.
template <class P, class RowsOf>
static void mix_group(const SliceGroup& group, const TilePlace& place, const Lanes& lanes, int low,
                      int pitch, const float* weight, float* sum, bool fresh, Prefetch& prefetch,
                      const RowsOf& rows_of) {
  KeyRow rows[BLOCK_KEYS];
  MixArgs a;
  a.rows = rows;
  a.row_count = 0;
  const int width = group.first->width, offset = group.first->offset, valid = place.lanes.valid;
  for (const Slice* s = group.first; s < group.last; s++) {
    for (int i = 0; i < s->rows; i++) {
      rows[a.row_count++] = {rows_of(*s, i), weight + static_cast<size_t>(s->slot + i * width) * W,
                             s->row, s->row_count};
    }
  }
  a.pitch = pitch;
  a.weight_row_pitch = SCORE_PITCH;
  a.sum_row_pitch = static_cast<size_t>(W) * pitch;
  a.fresh = fresh;
  const int vectors = pitch / W, together = mix_lanes(place.tile.rows);
  const MixKernels& kernels = MIX<P>[place.tile.rows - 1];
  const auto keys_of = [&](int l) { return std::max(0, std::min(lanes.count[l] - offset, width)); };
  // Whether the `n` lanes from `l` on have the same number of keys, with starts `step` apart.
  const auto alike = [&](int l, int n) {
    bool yes = l + n <= valid;
    for (int i = 1; yes && i < n; i++) yes = keys_of(l + i) == keys_of(l);
    return yes;
  };
  const auto slides = [&](int l) {
    bool yes = keys_of(l) >= SLIDE_LANES && alike(l, SLIDE_LANES);
    for (int i = 1; yes && i < SLIDE_LANES; i++) yes = lanes.start[l + i] == lanes.start[l] + i;
    return yes;
  };
  for (int l = 0, n; l < valid; l += n) {
    const auto* kernel = &kernels.one;
    int most = MAX_CHANNELS;
    n = 1;
    if (slides(l)) {
      kernel = &kernels.sliding;
      n = SLIDE_LANES;
      most = slide_channels(place.tile.rows);
    } else if (alike(l, together)) {
      kernel = &kernels.several;
      n = together;
    }
    a.keys = keys_of(l);
    a.lane = l;
    for (int i = 0; i < n; i++)
      a.start[i] = static_cast<size_t>(lanes.start[l + i] + offset - low) * pitch;
    prefetch.fetch();
    const int parts = (vectors + most - 1) / most, step = (vectors + parts - 1) / parts;
    for (int c = 0; c < vectors; c += step) {
      a.channel = c * W;
      a.sum = sum + l * pitch + a.channel;
      (*kernel)[std::min(step, vectors - c) - 1](a);
    }
  }
}

// The bias of each lane for one key: line[bias[l] + offset], for increasing offsets.
static VB_INLINE F bias_at(const Lanes& lanes, const float* line) {
  if (lanes.bias_uniform) return simd::set1(*line);
  if (simd::HAS_PERMUTE && lanes.bias_reach < 2 * W) {
    return simd::permute(simd::load(line), simd::load(line + W), lanes.bias, 0);
  }
  return simd::gather(line, lanes.bias);
}

// The index of the bias of (key row, query row) and the slice's first key, in lines of `pitch`.
static inline size_t bias_index(const Bias& bias, const TilePlace& place, const Slice& s,
                                int key_row, int row, size_t pitch) {
  const int dz = s.plane - place.z + bias.rows[0] / 2,
            dy = key_row - (place.tile.first + row) + bias.rows[1] / 2;
  return (static_cast<size_t>(dz) * bias.rows[1] + dy) * pitch +
         (place.lanes.bias_base + bias.columns / 2 + s.offset);
}

static void add_bias(const Bias& bias, const TilePlace& place, const Slice& s, float* score) {
  if (s.plane < 0) return;
  const float* table = bias.table.data() +
                       static_cast<size_t>(place.head) * bias.rows[0] * bias.rows[1] * bias.pitch;
  for (int r = s.row; r < s.row + s.row_count; r++) {
    float* out = score + r * SCORE_PITCH + static_cast<size_t>(s.slot) * W;
    for (int y = 0; y < s.rows; y++) {
      const float* line = table + bias_index(bias, place, s, s.key_row + y, r, bias.pitch);
      for (int k = 0; k < s.width; k++, out += W)
        simd::store(out, simd::load(out) + bias_at(place.lanes, line + k));
    }
  }
}

}  // namespace na
