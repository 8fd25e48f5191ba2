// The transpose of the weighted sum in `tile.h`: adds the contributions of a tile's queries to the
// gradients of the keys or values that they see, dV += P^T . dO.
#pragma once
#include "neighborhood/tile.h"

namespace na {

// ---- kernels -----------------------------------------------------------------------------------
// Lanes are channels. For N keys, and the query rows and lanes that see them:
// sum[n] += sum over r and l of weight[r][n][lane] * row[r][l].
struct ScatterArgs {
  const float* row;  // [query row][lane][channel], at the current channels
  size_t row_pitch;  // between query rows
  size_t pitch;      // between lanes
  int row_count;
  int lane, lane_end;   // the lanes that see all keys
  const float* weight;  // [lane_offset[l]] is the weight of lane l
  const int32_t* lane_offset;
  size_t weight_row_pitch;  // between query rows
  size_t weight_key_pitch;  // between keys
  float* const* sums;       // for each key row, its first channel
  size_t offset;            // of the column and the channels
};

template <int N, int C>
struct ScatterSums {
  F sum[N][C];

  // at(n) is the offset of the channels of key n.
  template <class At>
  VB_INLINE void load(const At& at) {
    VB_UNROLL
    for (int n = 0; n < N; n++) {
      VB_UNROLL
      for (int c = 0; c < C; c++) sum[n][c] = simd::load(at(n) + c * W);
    }
  }
  template <class At>
  VB_INLINE void store(const At& at) const {
    VB_UNROLL
    for (int n = 0; n < N; n++) {
      VB_UNROLL
      for (int c = 0; c < C; c++) simd::store(at(n) + c * W, sum[n][c]);
    }
  }
  // Adds the contribution of one query to the keys from `first` to `last`.
  VB_INLINE void add(const float* row, const float* weight, size_t key_pitch, int first, int last) {
    F v[C];
    VB_UNROLL
    for (int c = 0; c < C; c++) v[c] = simd::in_register(simd::load(row + c * W));
    VB_UNROLL
    for (int n = 0; n < N; n++) {
      if (n < first || n > last) continue;
      const F p = simd::in_register(simd::set1(weight[n * key_pitch]));
      VB_UNROLL
      for (int c = 0; c < C; c++) sum[n][c] = simd::fma(p, v[c], sum[n][c]);
    }
  }
  // Adds the contributions of the lanes of query row `r`.
  VB_INLINE void add_lanes(const ScatterArgs& a, int r, int first, int last) {
    const float* weights = a.weight + r * a.weight_row_pitch;
    const float* row = a.row + r * a.row_pitch + a.lane * a.pitch;
    for (int l = a.lane; l < a.lane_end; l++, row += a.pitch)
      add(row, weights + a.lane_offset[l], a.weight_key_pitch, first, last);
  }
};

// How the windows of a tile's query rows relate to the N key rows.
enum Stairs : int {
  LEVEL = 0,  // every query row sees all of them, or has zero weights for those it doesn't
  LOW = 1,    // bit: there are MAX_ROWS query rows, each of which starts one key row after the last
  HIGH = 2,   // bit: and each ends one key row after the last
};

// Keys of one column.
template <int N, int C, int STAIRS>
static void scatter_rows(const ScatterArgs& args) {
  const ScatterArgs a = args;
  ScatterSums<N, C> sums;
  const auto at = [&](int n) VB_INLINE_LAMBDA { return a.sums[n] + a.offset; };
  sums.load(at);
  if constexpr (STAIRS == LEVEL) {
    for (int r = 0; r < a.row_count; r++) sums.add_lanes(a, r, 0, N - 1);
  } else {
    VB_UNROLL
    for (int r = 0; r < MAX_ROWS; r++)
      sums.add_lanes(a, r, STAIRS & LOW ? r : 0, STAIRS & HIGH ? N - MAX_ROWS + r : N - 1);
  }
  sums.store(at);
}

// Adjacent keys of one row. EDGE -1: each of the N - 1 lanes before `lane` sees one key more than
// the one before it; 1: each of those from `lane_end` on sees one key less.
template <int N, int C, int EDGE>
static void scatter_columns(const ScatterArgs& args) {
  const ScatterArgs a = args;
  ScatterSums<N, C> sums;
  const auto at = [&](int n) VB_INLINE_LAMBDA { return a.sums[0] + a.offset + n * a.pitch; };
  sums.load(at);
  for (int r = 0; r < a.row_count; r++) {
    const float* weights = a.weight + r * a.weight_row_pitch;
    const auto add = [&](int l, int first, int last) VB_INLINE_LAMBDA {
      sums.add(a.row + r * a.row_pitch + l * a.pitch, weights + a.lane_offset[l], W, first, last);
    };
    if constexpr (EDGE < 0) {
      VB_UNROLL
      for (int n = 0; n < N - 1; n++) add(a.lane - (N - 1) + n, 0, n);
    }
    for (int l = a.lane; l < a.lane_end; l++) add(l, 0, N - 1);
    if constexpr (EDGE > 0) {
      VB_UNROLL
      for (int n = 1; n < N; n++) add(a.lane_end + n - 1, n, N - 1);
    }
  }
  sums.store(at);
}

constexpr int MAX_SCATTER_CHANNELS = 2;  // vectors of channels at once
constexpr int MAX_SCATTER_KEYS = simd::REGISTERS == 32 ? 10 : 6;

// [stairs][channel vectors - 1][keys - 1]
static constexpr auto SCATTER_ROWS = variants<4>([](auto stairs) {
  return variants<MAX_SCATTER_CHANNELS>([](auto c) {
    return variants<MAX_SCATTER_KEYS>([](auto n) {
      constexpr int STAIRS = n.value < MAX_ROWS ? int{LEVEL} : decltype(stairs)::value - 1;
      return scatter_rows<n.value, decltype(c)::value, STAIRS>;
    });
  });
});
// [edge + 1][channel vectors - 1][keys - 1]
static constexpr auto SCATTER_COLUMNS = variants<3>([](auto edge) {
  return variants<MAX_SCATTER_CHANNELS>([](auto c) {
    return variants<MAX_SCATTER_KEYS>([](auto n) {
      return scatter_columns<n.value, decltype(c)::value, decltype(edge)::value - 2>;
    });
  });
});
using ScatterKernels = std::decay_t<decltype(SCATTER_ROWS[0])>;

// ---- a tile ------------------------------------------------------------------------------------
// Zeroes scores of key rows of a group that a query row does not see, as `scatter_group` requires.
static inline void clear_unseen(const Slice& s, int rows, float* score) {
  for (int r = 0; r < rows; r++) {
    if (r >= s.row && r < s.row + s.row_count) continue;
    std::memset(score + r * SCORE_PITCH + static_cast<size_t>(s.slot) * W, 0,
                sizeof(float) * s.rows * s.width * W);
  }
}

// Adds to the key rows of one group of slices.
class Scatter {
 public:
  // `queries` is [row][lane][channel]; sums_of(slice, i) is the slice's i-th key row,
  // [column][channel] from column `low`.
  template <class SumsOf>
  Scatter(const SliceGroup& group, const Lanes& lanes, int valid, int low, int pitch,
         const float* weight, const float* queries, const SumsOf& sums_of)
      : lanes_(lanes),
        valid_(valid),
        width_(group.first->width),
        offset_(group.first->offset),
        low_(low),
        weight_(weight + static_cast<size_t>(group.first->slot) * W),
        queries_(queries) {
    for (const Slice* s = group.first; s < group.last; s++) {
      for (int i = 0; i < s->rows; i++, key_rows_++) {
        sums_[key_rows_] = sums_of(*s, i);
        first_row_[key_rows_] = s->row;
        end_row_[key_rows_] = s->row + s->row_count;
      }
    }
    for (int l = 0; l < W; l++) lane_offset_[l] = l - lanes.offset[l] * W;
    args_.row_pitch = static_cast<size_t>(W) * pitch;
    args_.pitch = pitch;
    args_.lane_offset = lane_offset_;
    args_.weight_row_pitch = SCORE_PITCH;
  }

  void run(Prefetch& prefetch) {
    if (key_rows_ == 1 && slides()) {
      run_sliding(prefetch);
    } else {
      run_columns(prefetch);
    }
  }

 private:
  // Whether the windows of the lanes start at consecutive positions and all lanes share a key.
  bool slides() const {
    bool yes = width_ >= valid_;
    for (int l = 0; yes && l < valid_; l++)
      yes = lanes_.offset[l] == l && lanes_.count[l] - offset_ >= width_;
    return yes;
  }

  void run_sliding(Prefetch& prefetch) {
    const int edge = valid_ - 1;
    const Part part(*this, 0, 1);
    // Adds columns [from, to), all of which are seen by the lanes before a moving one.
    const auto add = [&](int from, int to, int edge_kind) {
      const int parts = (to - from + MAX_SCATTER_KEYS - 1) / MAX_SCATTER_KEYS;
      for (int i = 0; i < parts; i++) {
        const int column = from + (to - from) * i / parts,
                  columns = from + (to - from) * (i + 1) / parts - column;
        args_.lane = edge_kind < 0 ? column + columns - width_ : 0;
        args_.lane_end = edge_kind > 0 ? column + 1 : valid_;
        add_columns(part, SCATTER_COLUMNS[edge_kind + 1], column, columns);
        prefetch.fetch();
      }
    };
    add(0, edge, 1);
    add(edge, width_, 0);
    add(width_, width_ + edge, -1);
  }

  void run_columns(Prefetch& prefetch) {
    Part parts[BLOCK_KEYS / MAX_SCATTER_KEYS + 1];
    const int part_count = (key_rows_ + MAX_SCATTER_KEYS - 1) / MAX_SCATTER_KEYS,
              row_step = (key_rows_ + part_count - 1) / part_count;
    for (int i = 0; i < part_count; i++)
      parts[i] = Part(*this, i * row_step, std::min(row_step, key_rows_ - i * row_step));
    // The lanes that see a column; both ends only increase.
    int lane = 0, lane_end = 0;
    const auto move_lanes = [&](int column) {
      column += lanes_.base + offset_;
      while (lane < valid_ &&
             std::min(lanes_.end(lane), lanes_.start[lane] + offset_ + width_) <= column)
        lane++;
      while (lane_end < valid_ && lanes_.start[lane_end] + offset_ <= column) lane_end++;
    };
    move_lanes(0);
    const int end = lanes_.last - lanes_.base - offset_;
    for (int column = 0, columns; column < end; column += columns) {
      if (lane == valid_) break;
      args_.lane = lane;
      args_.lane_end = lane_end;
      columns = 1;
      move_lanes(column + 1);
      if (key_rows_ == 1) {  // adjacent columns seen by the same lanes are combined
        while (columns < MAX_SCATTER_KEYS && lane == args_.lane && lane_end == args_.lane_end)
          move_lanes(column + ++columns);
      }
      if (args_.lane >= args_.lane_end) continue;
      if (key_rows_ == 1) {
        add_columns(parts[0], SCATTER_COLUMNS[1], column, columns);
      } else {
        for (int i = 0; i < part_count; i++) add_rows(parts[i], column);
      }
      prefetch.fetch();
    }
  }

  // Key rows that are processed at once.
  struct Part {
    int first = 0, rows = 0;
    int low_row = MAX_ROWS, row_count = 0;  // the query rows that see any of them
    int stairs = LEVEL;

    Part() = default;
    Part(const Scatter& s, int first, int rows) : first(first), rows(rows) {
      int end_row = 0;
      for (int i = first; i < first + rows; i++) {
        low_row = std::min(low_row, s.first_row_[i]);
        end_row = std::max(end_row, s.end_row_[i]);
      }
      row_count = end_row - low_row;
      if (rows < MAX_ROWS) return;
      for (int kind : {LOW | HIGH, int{LOW}, int{HIGH}}) {
        bool are = true;
        for (int i = 0; i < rows; i++) {
          const int low = kind & HIGH ? std::max(0, i - (rows - MAX_ROWS)) : 0,
                    high = kind & LOW ? std::min(MAX_ROWS, i + 1) : MAX_ROWS;
          are &= s.first_row_[first + i] == low && s.end_row_[first + i] == high;
        }
        if (are) {
          stairs = kind;
          return;
        }
      }
    }
  };

  // Adds one column, counted from the first.
  void add_rows(const Part& part, int column) {
    args_.weight_key_pitch = static_cast<size_t>(width_) * W;
    add(part, SCATTER_ROWS[part.stairs], column, part.rows);
  }
  // Adds adjacent columns of one key row.
  void add_columns(const Part& part, const ScatterKernels& kernels, int column, int columns) {
    args_.weight_key_pitch = W;
    add(part, kernels, column, columns);
  }
  void add(const Part& part, const ScatterKernels& kernels, int column, int keys) {
    const int vectors = static_cast<int>(args_.pitch) / W;
    args_.row_count = part.row_count;
    args_.sums = sums_ + part.first;
    args_.weight = weight_ + part.low_row * SCORE_PITCH +
                   (static_cast<ptrdiff_t>(part.first) * width_ + column) * W;
    args_.offset = (lanes_.base + offset_ - low_ + column) * args_.pitch;
    args_.row = queries_ + part.low_row * args_.row_pitch;
    for (int c = 0, step; c < vectors; c += step) {
      step = std::min(MAX_SCATTER_CHANNELS, vectors - c);
      kernels[step - 1][keys - 1](args_);
      args_.offset += step * W;
      args_.row += step * W;
    }
  }

  const Lanes& lanes_;
  const int valid_, width_, offset_, low_;
  const float *weight_, *queries_;
  int key_rows_ = 0;
  float* sums_[BLOCK_KEYS];
  int first_row_[BLOCK_KEYS], end_row_[BLOCK_KEYS];  // the query rows that see the key row
  int32_t lane_offset_[W];
  ScatterArgs args_;
};

}  // namespace na
