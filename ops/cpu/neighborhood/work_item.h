// The work items of a call. Each processes the tiles of a chunk of query rows, with the keys around
// them packed in a ring buffer.
#pragma once
#include "neighborhood/tile.h"

namespace na {

// The packed additional keys or values of one head.
struct Additional {
  Buffer rows, columns;
  size_t column_pitch = 0;
  int row_pitch = 0, channels = 0;

  template <class Ring>
  void pack(const Tensor& t, int n, int channel_count, int batch, int head) {
    if (!n) return;
    channels = channel_count;
    row_pitch = round_up(channels, W);
    column_pitch = round_up(n + W, W);
    std::vector<int> order(n);
    for (int i = 0; i < n; i++) order[i] = i;
    using T = typename Ring::Element;
    const T* line = static_cast<const T*>(t.data) + t.at(batch, 0, 0, head);
    pack_rows<typename Ring::Rows>(line, t.x, order.data(), n, channels, 1.f,
                                   rows.get(static_cast<size_t>(n + W) * row_pitch));
    pack_columns<typename Ring::Columns>(line, t.x, order.data(), n, channels, 1.f,
                                         columns.get(channels * column_pitch), column_pitch);
  }
};

// The keys or values that a tile sees: those of a ring, and maybe additional ones, seen by the lanes
// `shared`.
template <class Ring>
struct SeenKeys {
  const Ring& ring;
  const typename Ring::Field& field;
  const TilePlace& place;
  const Lanes& shared;
  const Additional* more;

  // The scores of a slice, see `score_slice`.
  void score(const Slice& s, float scale, const float* query, float* score,
             Prefetch& prefetch) const {
    using P = typename Ring::Columns;
    const int steps = simd::steps<P>(field.channels);
    if (s.plane < 0) {
      return score_slice<P>(s, shared, 0, steps, scale, more->column_pitch, query, score, prefetch,
                            [&](int) { return more->columns.data(); });
    }
    score_slice<P>(s, place.lanes, ring.low(), steps, scale, ring.column_pitch(), query, score,
                   prefetch, [&](int y) {
                     return ring.columns(field, place.kv_slot, s.plane, s.key_row + y);
                   });
  }

  // The weighted sums of a group, see `mix_group`.
  void mix(const SliceGroup& group, const float* weight, float* sum, bool fresh,
           Prefetch& prefetch) const {
    using P = typename Ring::Rows;
    if (group.first->plane < 0) {
      return mix_group<P>(group, place, shared, 0, field.row_pitch, weight, sum, fresh, prefetch,
                          [&](const Slice&, int) { return more->rows.data(); });
    }
    mix_group<P>(group, place, place.lanes, ring.low(), field.row_pitch, weight, sum, fresh,
                 prefetch, [&](const Slice& s, int y) {
                   return ring.rows(field, place.kv_slot, s.plane, s.key_row + y);
                 });
  }
};

// A work item: a chunk of query rows and a segment of the last axis, for a block of key heads and
// their query heads.
struct WorkItem {
  const Layout& layout;
  const Segment& segment;
  const Chunk& chunk;
  int index;  // among the items of a head
  int batch, first_head, heads;

  WorkItem(const Problem& p, const Layout& layout, int64_t i)
      : layout(layout),
        segment(layout.segments[i % layout.segments.size()]),
        chunk(layout.chunks[i / layout.segments.size() % layout.chunks.size()]),
        index(static_cast<int>(i % layout.items_per_head)),
        batch(static_cast<int>(i / layout.items_per_head / layout.head_blocks)),
        first_head(static_cast<int>(i / layout.items_per_head % layout.head_blocks) *
                   layout.head_block),
        heads(std::min(layout.head_block, static_cast<int>(p.kv_heads) - first_head)) {}

  // The number of keys that other items see, too, in total and before a key row.
  size_t shared_keys() const {
    return layout.z.size * layout.shared_keys(chunk, segment, chunk.high);
  }
  size_t shared_keys(int plane, int key_row) const {
    return layout.shared_keys(chunk, segment, plane, key_row);
  }
};

// A thread's buffers, kept between items.
template <class Ring>
struct ItemScratch {
  typename Ring::Field keys, values;
  std::vector<Additional> additional_keys, additional_values;  // for each key head of the item
  Plan plan;

  void pack_additional(const Problem& p, const WorkItem& item, const Tensor& key,
                       const Tensor& value) {
    const int n = static_cast<int>(p.additional);
    if (additional_keys.size() < static_cast<size_t>(item.heads)) {
      additional_keys = std::vector<Additional>(item.heads);
      additional_values = std::vector<Additional>(item.heads);
    }
    for (int h = 0; h < item.heads; h++) {
      const int head = item.first_head + h;
      additional_keys[h].template pack<Ring>(key, n, static_cast<int>(p.dim), item.batch, head);
      additional_values[h].template pack<Ring>(value, n, static_cast<int>(p.value_dim), item.batch,
                                               head);
    }
  }
};

// Calls body(place, prefetch) for each tile of the item, with the tile's plan made and its keys in
// the ring. Before that, it calls next(place, prefetch), which adds prefetches for the tile below,
// or for the adjacent tile if the item has a single row of tiles.
template <class Ring, class Next, class Body>
static void for_each_tile(const Problem& p, const Layout& layout, const WorkItem& item, Ring& ring,
                          ItemScratch<Ring>& scratch, const Next& next, const Body& body) {
  const int groups = static_cast<int>(p.heads / p.kv_heads);
  for (int row = item.chunk.first; row < item.chunk.end; row++) {
    const RowTile& tile = layout.tiles[row];
    ring.advance(tile.low, tile.high);
    for (int z = 0; z < layout.z.size; z++) {
      for (int g = item.segment.first; g < item.segment.end; g++) {
        const Lanes& lanes = layout.lanes[g];
        make_plan(layout.z.start[z], layout.z.count[z], tile, lanes.width,
                  static_cast<int>(p.additional), scratch.plan);
        // The least number of calls of fetch in a tile: per row of scores, and per sums of some
        // lanes.
        int portions = static_cast<int>(scratch.plan.blocks.size()) *
                       ((lanes.valid + SLIDE_LANES - 1) / SLIDE_LANES);
        for (const Slice& slice : scratch.plan.slices) portions += slice.rows;
        for (int h = 0; h < item.heads * groups; h++) {
          const TilePlace place{layout, tile, lanes, item.batch, z, item.first_head * groups + h,
                                h / groups};
          if (item.chunk.end - item.chunk.first == 1) {
            const Lanes& beside = layout.lanes[std::min(g + 1, item.segment.end - 1)];
            const TilePlace soon{layout, tile, beside, item.batch, z, place.head, place.kv_slot};
            Prefetch prefetch(soon.order(), beside.valid, portions);
            next(soon, prefetch);
            body(place, prefetch);
            continue;
          }
          Prefetch prefetch(place.order(), lanes.valid, portions);
          if (row + 1 < item.chunk.end) {
            const RowTile& below = layout.tiles[row + 1];
            if (h % groups == 0) ring.add_rows(prefetch, place.kv_slot, z, tile.high, below.high);
            const TilePlace next_place{layout, below, lanes, item.batch, z, place.head, place.kv_slot};
            next(next_place, prefetch);
          }
          body(place, prefetch);
        }
      }
    }
  }
}

}  // namespace na
