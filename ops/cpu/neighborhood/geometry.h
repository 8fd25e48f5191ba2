// Small tables per axis of which keys a query sees. An axis is traversed in "packed" order: the
// positions of dilation group 0, then those of group 1, and so on. In that order, the window of
// every query is a contiguous run of keys, and window starts and ends never decrease. Borders,
// dilation, stride and causality only change the entries of these tables.
#pragma once
#include "common/kernel.h"

namespace na {

struct Axis {
  int size = 0;
  std::vector<int> order;      // packed index -> position
  std::vector<int> start;      // packed index of the first key of the window
  std::vector<int> count;      // keys in the window
  std::vector<int> group_end;  // packed index after the last member of the query's dilation group
  int max_count = 0;

  Axis(int n, int kernel, int stride, int dilation, bool causal)
      : size(n), order(n), start(n), count(n), group_end(n) {
    int first = 0;  // packed index of the first member of the group
    for (int g = 0; g < dilation && g < n; g++) {
      const int length = (n - g + dilation - 1) / dilation;
      for (int p = 0; p < length; p++) {
        const int i = first + p;
        const int leader =
            std::min(p / stride * stride + (causal ? stride - 1 : stride / 2), length - 1);
        const int low = causal ? std::max(0, leader - kernel + 1)
                               : std::min(std::max(leader - kernel / 2, 0), length - kernel);
        order[i] = p * dilation + g;
        start[i] = first + low;
        count[i] = causal ? p - low + 1 : kernel;
        group_end[i] = first + length;
        max_count = std::max(max_count, count[i]);
      }
      first += length;
    }
  }
  int end(int i) const { return start[i] + count[i]; }
};

// Keys that the score kernel reads from one base: as many as registers can hold accumulators for
// MAX_ROWS query rows.
constexpr int MAX_KEYS = simd::REGISTERS == 32 ? 8 : 4;

// How the keys of W adjacent queries are loaded from a row of keys.
enum Fetch : int {
  DIRECT,       // lane l sees key base + l + j: one load
  PERMUTE,      // the j-th keys of the lanes are in W adjacent columns: a load and a lookup
  PERMUTE_TWO,  // all keys of the lanes are in 2 W adjacent columns: a lookup in two registers
  GATHER,       // anything else
  BROADCAST,    // every lane sees the same key
};

// W queries adjacent along the last axis, one per lane.
struct Lanes {
  int first = 0,
      valid = 0;            // packed index of lane 0; lanes in use (the others repeat the last one)
  int base = 0, width = 0;  // smallest window start; largest window
  int last = 0;             // one past the last key that any lane sees
  Fetch fetch = DIRECT;
  bool ragged = false;      // the lanes have windows of different sizes
  int32_t start[simd::W];   // packed index of the first key
  int32_t count[simd::W];   // keys seen
  int32_t offset[simd::W];  // start - base
  int32_t bias[simd::W];    // start - query, the relative position of the first key; minus the
                            // smallest of the lanes
  int bias_base = 0;        // the smallest of the lanes
  int bias_reach = 0;       // the largest entry of `bias`
  bool bias_uniform = false;

  int end(int l) const { return start[l] + count[l]; }
};

static inline std::vector<Lanes> make_lanes(const Axis& axis) {
  std::vector<Lanes> all;
  for (int first = 0; first < axis.size; first += simd::W) {
    Lanes t;
    t.first = first;
    t.valid = std::min(simd::W, axis.size - first);
    t.base = axis.start[first];
    t.bias_base = INT32_MAX;
    for (int l = 0; l < simd::W; l++) {
      const int i = first + std::min(l, t.valid - 1);
      t.start[l] = axis.start[i];
      t.count[l] = axis.count[i];
      t.offset[l] = axis.start[i] - t.base;
      t.bias[l] = axis.start[i] - i;
      t.width = std::max(t.width, axis.count[i]);
      t.last = std::max(t.last, axis.end(i));
      t.bias_base = std::min(t.bias_base, t.bias[l]);
    }
    bool direct = true;
    for (int l = 0; l < simd::W; l++) {
      direct &= t.offset[l] == l || l >= t.valid;
      t.ragged |= t.count[l] != t.width;
      t.bias[l] -= t.bias_base;
      t.bias_reach = std::max<int>(t.bias_reach, t.bias[l]);
    }
    t.bias_uniform = t.bias_reach == 0;
    const int reach = t.offset[simd::W - 1];
    if (!direct) {
      t.fetch = !simd::HAS_PERMUTE                ? GATHER
                : reach < simd::W                 ? PERMUTE
                : reach + MAX_KEYS <= 2 * simd::W ? PERMUTE_TWO
                                                  : GATHER;
    }
    all.push_back(t);
  }
  return all;
}

// The additional keys, seen by all lanes.
static inline Lanes make_shared_lanes(int keys) {
  Lanes t{};
  t.valid = simd::W;
  t.width = t.last = keys;
  t.fetch = BROADCAST;
  std::fill(t.count, t.count + simd::W, keys);
  return t;
}

// Up to `MAX_ROWS` query rows of one dilation group, processed together so that each loaded key is
// used for several of them. `runs` splits the union of their key rows by which query rows see them.
constexpr int MAX_ROWS = 3;
struct KeyRun {
  int low, high;       // key rows
  int row, row_count;  // query rows of the tile that see them
};
struct RowTile {
  int first, rows;
  int low, high;  // union of the key rows
  std::vector<KeyRun> runs;
};

// Tiles with as many rows as possible, but no tile of one row next to tiles of three.
static inline std::vector<RowTile> make_row_tiles(const Axis& axis) {
  std::vector<RowTile> tiles;
  for (int first = 0; first < axis.size;) {
    RowTile t;
    t.first = first;
    const int left = axis.group_end[first] - first, parts = (left + MAX_ROWS - 1) / MAX_ROWS;
    t.rows = (left + parts - 1) / parts;
    t.low = axis.start[first];
    t.high = axis.end(first + t.rows - 1);
    for (int key = t.low; key < t.high; key++) {
      int row = 0, end;
      while (row < t.rows && axis.end(first + row) <= key) row++;
      for (end = row; end < t.rows && axis.start[first + end] <= key;) end++;
      if (end == row) continue;
      if (!t.runs.empty() && t.runs.back().high == key && t.runs.back().row == row &&
          t.runs.back().row_count == end - row) {
        t.runs.back().high++;
      } else {
        t.runs.push_back({key, key + 1, row, end - row});
      }
    }
    first += t.rows;
    tiles.push_back(std::move(t));
  }
  return tiles;
}

// A rectangle of keys that is scored at once: key rows x offsets from each lane's window start.
// `slot` is the position of its scores in the score buffer. Slices are grouped into blocks whose
// scores fit `BLOCK_KEYS` slots. The softmax over blocks is online, so memory does not grow with
// the kernel size.
constexpr int BLOCK_KEYS = 128;
struct Slice {
  int plane, key_row, rows;  // plane < 0: the additional keys
  int offset, width;
  int row, row_count;  // query rows of the tile
  int slot;
};
struct Plan {
  std::vector<Slice> slices;
  std::vector<int> blocks;  // for each block, one past its last slice

  // Calls body(first, last) with the slices [first, last) of each block.
  template <class Body>
  void for_each_block(const Body& body) const {
    const Slice* first = slices.data();
    for (int end : blocks) {
      body(first, slices.data() + end);
      first = slices.data() + end;
    }
  }
};

static inline void make_plan(int plane, int planes, const RowTile& tile, int width, int additional,
                             Plan& plan) {
  plan.slices.clear();
  plan.blocks.clear();
  int used = 0;
  const auto close_block = [&] {
    if (used) plan.blocks.push_back(static_cast<int>(plan.slices.size()));
    used = 0;
  };
  const auto add = [&](Slice s, int row_end, int width_total) {
    while (s.key_row < row_end) {
      if (used + std::min(width_total, BLOCK_KEYS) > BLOCK_KEYS) close_block();
      if (width_total > BLOCK_KEYS) {  // even one row is too large
        s.rows = 1;
        for (s.offset = 0; s.offset < width_total; s.offset += s.width) {
          close_block();
          s.width = std::min(BLOCK_KEYS, width_total - s.offset);
          s.slot = 0;
          used = s.width;
          plan.slices.push_back(s);
        }
      } else {
        s.rows = std::min(row_end - s.key_row, (BLOCK_KEYS - used) / width_total);
        s.slot = used;
        used += s.rows * width_total;
        plan.slices.push_back(s);
      }
      s.key_row += s.rows;
    }
  };
  for (int z = plane; z < plane + planes; z++) {
    for (const KeyRun& run : tile.runs) {
      add({z, run.low, 0, 0, width, run.row, run.row_count, 0}, run.high, width);
    }
  }
  if (additional) add({-1, 0, 0, 0, additional, 0, tile.rows, 0}, 1, additional);
  close_block();
}

}  // namespace na
