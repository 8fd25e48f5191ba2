// Linear layers of bfloat16 with AMX, whose tiles hold 16 rows of 32 inputs or 16 rows of 16 sums.
// The outputs are split into panels of two tiles; up to 32 rows are computed at once.
#pragma once
#include "gemm/block.h"
#include "gemm/pack.h"

namespace linear {

#if VB_AMX
// The intrinsics do not declare all their reads and writes. If they were inlined, compilers would
// treat memory as unused.
#define VB_APART __attribute__((noinline))

// Tiles 0 to 3 are the sums, 4 and 5 rows, 6 and 7 weights. The previous configuration is restored
// at the end, since other libraries use tiles, too.
class Tiles {
 public:
  VB_APART Tiles() {
    _tile_storeconfig(before_);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } own;
    static_assert(sizeof own == 64, "what the instruction reads");
    __asm__ volatile("" : : "r"(&own) : "memory");
    _tile_loadconfig(&own);
  }
  VB_APART ~Tiles() { _tile_loadconfig(before_); }
  Tiles(const Tiles&) = delete;

 private:
  alignas(64) char before_[64];
};

// Up to two tiles of rows from `row` on. Tiles that would reach past the last row begin earlier;
// repeated rows are not stored.
struct TileRows {
  int64_t first, second;
  bool two;

  TileRows(int64_t row, int64_t count) : two(row + TILE_ROWS < count) {
    const int64_t last = std::max<int64_t>(0, count - TILE_ROWS);
    first = std::min(row, last), second = std::min(row + TILE_ROWS, last);
  }
};

// The sums of a block whose epilogue is still to be computed. It is computed a few rows at a time
// between the products of the next block, since tiles and vectors are multiplied by different units
// of a core, which run ahead of each other by a few hundred instructions only.
//
// Epilogue: epilogue.finish(row, count, sums) for rows of one tile; `wide` if sums have two vectors.
template <class Epilogue>
class Unfinished {
 public:
  // The sums of the next block.
  float* next() { return sums_[current_ ^ 1]; }

  // `next` has the sums of the rows from `row` to `end`. Finishes those before.
  void start(const Epilogue& epilogue, const TileRows& tiles, int64_t row, int64_t end) {
    finish();
    epilogue_ = epilogue, tiles_ = tiles;
    row_ = row, middle_ = std::min(row + TILE_ROWS, end), end_ = end;
    current_ ^= 1;
  }

  // The rows to finish with each of `steps` products, enough to hide the latency of instructions.
  int64_t share(int64_t steps) const {
    constexpr int64_t fewest = 8;
    return std::max(fewest, (end_ - row_ + steps - 1) / steps);
  }

  // Finishes up to `count` rows.
  VB_INLINE void finish(int64_t count) {
    if (row_ < end_) finish_some(count);
  }

  void finish() {
    while (row_ < end_) finish_some(TILE_ROWS);
  }

 private:
  VB_APART void finish_some(int64_t count) {
    const bool is_first = row_ < middle_;
    const int64_t end = std::min(row_ + count, is_first ? middle_ : end_);
    const int64_t place = is_first ? row_ - tiles_.first : TILE_ROWS + row_ - tiles_.second;
    epilogue_.finish(row_, end - row_, sums_[current_] + place * (epilogue_.wide ? 2 : 1) * W);
    row_ = end;
  }

  Epilogue epilogue_{};
  TileRows tiles_{0, 0};
  int64_t row_ = 0, middle_ = 0, end_ = 0;
  int current_ = 0;
  alignas(64) float sums_[2][2 * TILE_ROWS * PANEL];
};

// Of rows in bfloat16.
struct FloatEpilogue {
  const Problem* p;
  Block<BFloat16> block;  // of the first row
  bool wide;

  void finish(int64_t row, int64_t count, float* sums) const {
    wide ? finish_rows<2>(*p, block, row, count, sums) : finish_rows<1>(*p, block, row, count, sums);
  }
};

// sums += rows · weights, in tiles of In.
#define VB_ADD_TILES(sums, rows, weights)                                  \
  if constexpr (sizeof(In) == 1) {                                         \
    _tile_dpbusd(sums, rows, weights);                                     \
  } else {                                                                 \
    _tile_dpbf16ps(sums, rows, weights);                                   \
  }

// R tiles of rows of bfloat16 or bytes, `second` elements apart, times V tiles of weights: R × V
// tiles of sums, beginning with `start`, whose rows are `start_pitch` apart, or with zeros if that
// is null. Finishes rows of another block meanwhile.
template <int R, int V, class In, class Weight, class Epilogue>
__attribute__((noinline, target("amx-int8"))) static void multiply(
    const In* in, ptrdiff_t second, int64_t in_stride, const Weight* weight, int64_t steps,
    const float* start, int64_t start_pitch, Prefetch& prefetch, Unfinished<Epilogue>& before,
    float* sums) {
  constexpr int64_t inputs = 64 / sizeof(In), tile = TILE_ROWS * inputs;
  constexpr int64_t bytes = sizeof(float), sums_pitch = V * W;
  const int64_t share = before.share(steps), pitch = in_stride * int64_t{sizeof(In)};
  __asm__ volatile("" : : : "memory");  // the loads below do not declare that they read memory
  if (start) {
    const float* const below = start + TILE_ROWS * start_pitch;
    _tile_loadd(0, start, start_pitch * bytes);
    if (V == 2) _tile_loadd(1, start + W, start_pitch * bytes);
    if (R == 2) _tile_loadd(2, below, start_pitch * bytes);
    if (R == 2 && V == 2) _tile_loadd(3, below + W, start_pitch * bytes);
  } else {
    _tile_zero(0);
    if (V == 2) _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2 && V == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k++, in += inputs, weight += V * tile) {
    prefetch.fetch();
    _tile_loadd(6, weight, 64);
    _tile_loadd(4, in, pitch);
    VB_ADD_TILES(0, 4, 6)
    if (V == 2) {
      _tile_loadd(7, weight + tile, 64);
      VB_ADD_TILES(1, 4, 7)
    }
    if (R == 2) {
      _tile_loadd(5, in + second, pitch);
      VB_ADD_TILES(2, 5, 6)
      if (V == 2) { VB_ADD_TILES(3, 5, 7) }
    }
    before.finish(share);
  }
  _tile_stored(0, sums, sums_pitch * bytes);
  if (V == 2) _tile_stored(1, sums + W, sums_pitch * bytes);
  if (R == 2) _tile_stored(2, sums + TILE_ROWS * sums_pitch, sums_pitch * bytes);
  if (R == 2 && V == 2) _tile_stored(3, sums + TILE_ROWS * sums_pitch + W, sums_pitch * bytes);
}

// The same for the rows of one or two tiles.
template <int V, class In, class Weight, class Epilogue>
static void multiply(const TileRows& tiles, const In* rows, int64_t in_stride, const Weight* weight,
                     int64_t steps, const float* start, int64_t start_pitch, Prefetch& prefetch,
                     Unfinished<Epilogue>& before, float* sums) {
  const In* const in = rows + tiles.first * in_stride;
  tiles.two ? multiply<2, V>(in, (tiles.second - tiles.first) * in_stride, in_stride, weight, steps,
                             start, start_pitch, prefetch, before, sums)
            : multiply<1, V>(in, 0, in_stride, weight, steps, start, start_pitch, prefetch, before,
                             sums);
}

template <int V>
static void run_panel(const Problem& p, const Rows<BFloat16>& rows, const Block<BFloat16>& panel,
                      Prefetch& prefetch, Unfinished<FloatEpilogue>& unfinished) {
  const int64_t steps = rows.in_features / TILE_INPUTS;
  for (int64_t row = 0; row < rows.count; row += 2 * TILE_ROWS) {
    const TileRows tiles(row, rows.count);
    multiply<V>(tiles, panel.in, rows.in_stride, panel.weight, steps, panel.bias, 0, prefetch,
                unfinished, unfinished.next());
    unfinished.start({&p, panel, V == 2}, tiles, row,
                     std::min(row + 2 * TILE_ROWS, rows.count));
  }
}

static void run_tiles(const Problem& p, const Tensors& t, const Rows<BFloat16>& rows,
                      Range panels) {
  const Tiles tiles;
  Unfinished<FloatEpilogue> unfinished;
  const int64_t blocks = (rows.count + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    const int64_t n = panel * PANEL, left = p.out_features - n;
    const bool wide = left > W, last = panel + 1 == panels.end;
    const BFloat16* weight = static_cast<const BFloat16*>(t.weight) + n * rows.in_features;
    const int64_t next = std::min<int64_t>(PANEL, padded(p.out_features) - n - PANEL);
    Prefetch prefetch(weight + PANEL * rows.in_features,
                last ? 0 : next * rows.in_features * int64_t{sizeof(BFloat16)},
                blocks * (rows.in_features / TILE_INPUTS));
    alignas(64) float bias[PANEL] = {};
    std::copy_n(t.bias + n, std::min<int64_t>(PANEL, left), bias);
    Block<BFloat16> block = block_at(p, t, rows, n);
    block.in = rows.in, block.weight = weight, block.bias = bias;
    wide ? run_panel<2>(p, rows, block, prefetch, unfinished)
         : run_panel<1>(p, rows, block, prefetch, unfinished);
  }
  unfinished.finish();
}

#else
static void run_tiles(const Problem&, const Tensors&, const Rows<BFloat16>&, Range) {}
#endif

}  // namespace linear
