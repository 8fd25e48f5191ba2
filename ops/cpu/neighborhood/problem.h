// The sizes of a call, and its division into work items that threads process one by one. The
// division of the map depends only on sizes, never on the number of threads, and so do results.
#pragma once
#include "neighborhood/geometry.h"
#include "neighborhood/pack.h"

namespace na {

// attention.py fills in these fields. Lower ranks are padded with leading axes of length 1.
struct Problem {
  int64_t batch, heads, kv_heads, dim, value_dim, additional;
  int64_t size[3], kernel[3], stride[3], dilation[3], causal[3];
  int64_t bfloat16, threads;
  double scale;
};

// A segment of the last axis: the lane groups [first, end), and the key columns [low, low +
// columns) that they see.
struct Segment {
  int first, end;
  int low, columns;
};

// A chunk of query row tiles [first, end), and the key rows [low, high) that they see.
struct Chunk {
  int first, end;
  int low, high;
};

struct Layout {
  Axis z, y, x;
  std::vector<Lanes> lanes;
  std::vector<RowTile> tiles;
  std::vector<Segment> segments;
  std::vector<Chunk> chunks;
  int ring_rows = 0;    // maximum key rows that a tile sees
  int max_columns = 0;  // maximum key columns of a segment
  int items_per_head = 0;
  // The number of chunks that see a key row, and of segments that see a key column.
  std::vector<int> row_chunks, column_segments;
  // Prefix counts of the key rows seen by several chunks, and of the columns seen by several
  // segments.
  std::vector<int> shared_rows, shared_columns;
  // Key heads per item. They are adjacent in memory, so loading one helps the others. Heads are
  // independent, so this may depend on the number of threads.
  int head_block = 1;
  int head_blocks = 1;

  Layout(const Problem& p, bool sums_over_items) : z(axis(p, 0)), y(axis(p, 1)), x(axis(p, 2)) {
    lanes = make_lanes(x);
    tiles = make_row_tiles(y);
    for (const RowTile& t : tiles) ring_rows = std::max(ring_rows, t.high - t.low);

    const int lane_groups = static_cast<int>(lanes.size()),
              tile_count = static_cast<int>(tiles.size());
    const int64_t heads = std::max<int64_t>(1, p.batch * p.kv_heads);
    // Enough items to keep many threads busy, but each large compared to the border of keys that
    // neighbouring items pack again and, if sums over items are needed, sum and store again.
    constexpr int64_t WANTED_ITEMS = 64;
    constexpr double ITEM_FLOPS = 10e6;
    int64_t wanted = (std::min<int64_t>(WANTED_ITEMS, flops(p) / FLOPS_OF_A_THREAD) + heads - 1) /
                     heads;
    if (sums_over_items) {
      wanted = std::min<int64_t>(WANTED_ITEMS, static_cast<int64_t>(flops(p) / ITEM_FLOPS)) / heads;
      wanted = std::max<int64_t>(wanted, 1);
    }
    wanted = p.threads == 1 && !sums_over_items ? 1 : std::max<int64_t>(wanted, 1);
    const int windows = sums_over_items ? 4 : 2;
    const int min_tiles = std::max(2, (windows * y.max_count + MAX_ROWS - 1) / MAX_ROWS);
    const int chunk_count =
        static_cast<int>(std::min<int64_t>(wanted, std::max(1, tile_count / min_tiles)));
    for (int c = 0; c < chunk_count; c++) {
      Chunk k{tile_count * c / chunk_count, tile_count * (c + 1) / chunk_count, INT32_MAX, 0};
      for (int t = k.first; t < k.end; t++) {
        k.low = std::min(k.low, tiles[t].low);
        k.high = std::max(k.high, tiles[t].high);
      }
      chunks.push_back(k);
    }
    // A segment's packed keys should fit the L2 cache.
    constexpr int64_t CACHE_BYTES = 768 << 10;
    const int64_t column_bytes =
        static_cast<int64_t>(z.size) * ring_rows * (p.dim + p.value_dim) * 4;
    const int64_t min_groups = std::max(2, (windows * x.max_count + simd::W - 1) / simd::W);
    wanted = (wanted + chunk_count - 1) / chunk_count;
    const int64_t fit = CACHE_BYTES / column_bytes / simd::W;
    const int64_t per_segment =
        std::max(min_groups, std::min(fit, (lane_groups + wanted - 1) / wanted));
    const int segment_count = static_cast<int>(std::max<int64_t>(1, lane_groups / per_segment));
    for (int i = 0; i < segment_count; i++) {
      Segment s{lane_groups * i / segment_count, lane_groups * (i + 1) / segment_count, INT32_MAX,
                0};
      int high = 0;
      for (int g = s.first; g < s.end; g++) {
        s.low = std::min(s.low, lanes[g].base);
        high = std::max(high, lanes[g].last);
      }
      s.columns = high - s.low;
      max_columns = std::max(max_columns, s.columns);
      segments.push_back(s);
    }
    items_per_head = chunk_count * segment_count;
    row_chunks.resize(y.size);
    column_segments.resize(x.size);
    for (const Chunk& c : chunks) {
      for (int i = c.low; i < c.high; i++) row_chunks[i]++;
    }
    for (const Segment& s : segments) {
      for (int i = s.low; i < s.low + s.columns; i++) column_segments[i]++;
    }
    shared_rows = shared_before(row_chunks);
    shared_columns = shared_before(column_segments);

    // Backward, which needs sums over items, packs keys in both layouts and has two more rings for
    // gradients.
    const int64_t head_bytes =
        sums_over_items ? column_bytes * (max_columns + 3 * simd::W) * 5 / 2
                        : column_bytes * max_columns;
    head_block =
        static_cast<int>(std::min(p.kv_heads, std::max<int64_t>(1, CACHE_BYTES / head_bytes)));
    if (image_bytes(p) > LARGE_IMAGE_BYTES) {
      const int64_t fitting = std::min(heads_of_a_run(p), MOST_BYTES / head_bytes);
      head_block = static_cast<int>(std::max<int64_t>(head_block, fitting));
    }
    const int64_t busy = threads(p) == 1 ? 1 : 4 * threads(p);
    const auto blocks = [&] {
      return static_cast<int>((p.kv_heads + head_block - 1) / head_block);
    };
    while (head_block > 1 && p.batch * blocks() * items_per_head < busy) head_block--;
    head_blocks = blocks();
    head_block = static_cast<int>((p.kv_heads + head_blocks - 1) / head_blocks);  // evenly
  }
  // Whether exactly one item of a head sees a key.
  bool seen_once(int key_row, int key_column) const {
    return row_chunks[key_row] == 1 && column_segments[key_column] == 1;
  }
  // The number of an item's keys in a plane, in rows before `key_row`, that other items see, too.
  size_t shared_keys(const Chunk& chunk, const Segment& segment, int key_row) const {
    const size_t rows = key_row - chunk.low,
                 shared = shared_rows[key_row] - shared_rows[chunk.low],
                 columns = shared_columns[segment.low + segment.columns] -
                           shared_columns[segment.low];
    return shared * segment.columns + (rows - shared) * columns;
  }
  // The same for all planes up to a row of `plane`.
  size_t shared_keys(const Chunk& chunk, const Segment& segment, int plane, int key_row) const {
    return plane * shared_keys(chunk, segment, chunk.high) + shared_keys(chunk, segment, key_row);
  }
  int64_t items(const Problem& p) const { return p.batch * head_blocks * items_per_head; }

  // Less work is finished before other threads wake up.
  static constexpr double FLOPS_OF_A_THREAD = 1e6;
  static int64_t threads(const Problem& p) {
    const auto busy = static_cast<int64_t>(flops(p) / FLOPS_OF_A_THREAD);
    return std::clamp<int64_t>(p.threads, 1, std::max<int64_t>(busy, 1));
  }
  static double flops(const Problem& p) {
    double n = 2. * p.batch * p.heads * (p.dim + p.value_dim);
    double keys = 1.;
    for (int i = 0; i < 3; i++) {
      n *= p.size[i];
      keys *= p.kernel[i];
    }
    return n * (keys + p.additional);
  }

 private:
  // In larger images, queries, keys, values and results don't stay in the last-level cache until
  // the heads interleaved with this one are processed. Then it is faster to load runs of RUN_BYTES
  // for several heads at once, although their packed keys, up to MOST_BYTES, don't fit the L2
  // cache.
  static constexpr int64_t LARGE_IMAGE_BYTES = 16 << 20, RUN_BYTES = 512, MOST_BYTES = 7 << 20;
  static int64_t element_bytes(const Problem& p) { return p.bfloat16 ? 2 : 4; }
  static int64_t image_bytes(const Problem& p) {
    const int64_t channels = (p.heads + p.kv_heads) * (p.dim + p.value_dim);
    return p.size[0] * p.size[1] * p.size[2] * channels * element_bytes(p);
  }
  static int64_t heads_of_a_run(const Problem& p) {
    const int64_t bytes = std::max<int64_t>(1, p.dim * element_bytes(p));
    return std::min(p.kv_heads, (RUN_BYTES + bytes - 1) / bytes);
  }

  static std::vector<int> shared_before(const std::vector<int>& times_seen) {
    std::vector<int> before(times_seen.size() + 1);
    for (size_t i = 0; i < times_seen.size(); i++) before[i + 1] = before[i] + (times_seen[i] != 1);
    return before;
  }
  static Axis axis(const Problem& p, int i) {
    return Axis(static_cast<int>(p.size[i]), static_cast<int>(p.kernel[i]),
                static_cast<int>(p.stride[i]), static_cast<int>(p.dilation[i]), p.causal[i] != 0);
  }
};

// The additive bias per head, [heads][2 kz - 1][2 ky - 1][2 kx - 1], times log2(e), with rows
// padded for vector loads.
struct Bias {
  int rows[2] = {0, 0}, columns = 0;
  size_t pitch = 0;
  Buffer table;

  Bias(const Problem& p, const float* rpb, float factor) {
    if (!rpb) return;
    for (int i = 0; i < 2; i++) rows[i] = static_cast<int>(2 * p.kernel[i] - 1);
    columns = static_cast<int>(2 * p.kernel[2] - 1);
    pitch = round_up(columns + 3 * simd::W, simd::W);
    const size_t lines = p.heads * rows[0] * rows[1];
    float* out = table.get(lines * pitch);
    for (size_t i = 0; i < lines; i++) {
      for (int c = 0; c < columns; c++) out[i * pitch + c] = rpb[i * columns + c] * factor;
    }
  }
  explicit operator bool() const { return pitch != 0; }
  size_t per_head() const { return static_cast<size_t>(rows[0]) * rows[1] * columns; }
};

// The packed keys and values (`fields`) of a block of heads around the current query rows, in a ring
// buffer of rows per plane. Rows enter as the queries advance, so each row is packed once per item.
template <class T, class RowProducts, class ColumnProducts>
class KeyRing {
 public:
  using Element = T;
  using Rows = RowProducts;
  using Columns = ColumnProducts;

  struct Field {
    bool pack_rows, pack_columns;
    Tensor tensor;
    int channels;
    int row_pitch;
    Buffer rows, columns;

    void set(const Tensor& t, int64_t channel_count, bool rows_wanted, bool columns_wanted) {
      channels = static_cast<int>(channel_count);
      pack_rows = rows_wanted;
      pack_columns = columns_wanted;
      tensor = t;
      row_pitch = round_up(channels, simd::W);
    }
  };

  KeyRing(const Layout& layout, const Segment& segment, int batch, int first_head, int heads,
          std::initializer_list<Field*> fields)
      : layout_(layout),
        segment_(segment),
        batch_(batch),
        first_head_(first_head),
        heads_(heads),
        fields_(fields) {
    const Lanes& inner = layout.lanes[(segment.first + segment.end) / 2];
    before_ = (segment.low - inner.base) & (simd::W - 1);
    column_pitch_ = round_up(before_ + segment.columns + 3 * simd::W + MAX_KEYS, 16);
    if (column_pitch_ / 16 % 2 == 0)
      column_pitch_ += 16;  // adjacent channels map to different cache sets
    const size_t slots = static_cast<size_t>(heads) * layout.z.size * layout.ring_rows;
    for (Field* f : fields_) {
      if (f->pack_rows) f->rows.get(slots * row_size(*f));
      if (f->pack_columns) f->columns.get(slots * column_size(*f));
    }
  }

  void advance(int low, int high) {
    for (int y = std::max(next_, low); y < high; y++) {
      for (int z = 0; z < layout_.z.size; z++) {
        for (Field* f : fields_) {
          for (int h = 0; h < heads_; h++) pack(*f, h, z, y);
        }
      }
    }
    next_ = std::max(next_, high);
  }

  // Prefetches the key rows that enter next.
  template <class Prefetch>
  void add_rows(Prefetch& prefetch, int head, int z, int low, int high) const {
    for (int y = low; y < high; y++) {
      for (const Field* f : fields_) prefetch.add(line(*f, head, z, y), f->tensor.x, f->channels);
    }
  }

  // `head` counts from the first head of the block.
  const float* rows(const Field& f, int head, int z, int y) const {
    return f.rows.data() + slot(head, z, y) * row_size(f);
  }
  const float* columns(const Field& f, int head, int z, int y) const {
    return f.columns.data() + slot(head, z, y) * column_size(f) + before_;
  }
  size_t column_pitch() const { return column_pitch_; }
  int low() const { return segment_.low; }

 private:
  const T* line(const Field& f, int head, int z, int y) const {
    return static_cast<const T*>(f.tensor.data) +
           f.tensor.at(batch_, layout_.z.order[z], layout_.y.order[y], first_head_ + head);
  }
  size_t slot(int head, int z, int y) const {
    return (static_cast<size_t>(head) * layout_.z.size + z) * layout_.ring_rows +
           y % layout_.ring_rows;
  }
  size_t row_size(const Field& f) const {
    return static_cast<size_t>(segment_.columns + simd::W) * f.row_pitch;
  }
  size_t column_size(const Field& f) const {
    return static_cast<size_t>(simd::steps<Columns>(f.channels)) * column_pitch_;
  }

  void pack(Field& f, int head, int z, int y) {
    const T* line = this->line(f, head, z, y);
    const int* order = layout_.x.order.data() + segment_.low;
    if (f.pack_rows) {
      pack_rows<Rows>(line, f.tensor.x, order, segment_.columns, f.channels, 1.f,
                      f.rows.data() + slot(head, z, y) * row_size(f));
    }
    if (f.pack_columns) {
      pack_columns<Columns>(line, f.tensor.x, order, segment_.columns, f.channels, 1.f,
                            f.columns.data() + slot(head, z, y) * column_size(f) + before_,
                            column_pitch_, before_);
    }
  }

  const Layout& layout_;
  const Segment& segment_;
  int batch_, first_head_, heads_;
  std::vector<Field*> fields_;
  int before_;  // leading columns, which align most lane groups to whole vectors
  size_t column_pitch_;
  int next_ = 0;
};

}  // namespace na
