// Two register-blocked products of neighborhood attention; the third, in `scatter.h`, is the
// transpose of one of them.
#pragma once
#include "common/dot.h"
#include "common/variants.h"
#include "neighborhood/geometry.h"

namespace na {

using simd::F;
using simd::Floats;
using simd::Products;
using simd::W;

// ---- scores: s = q . k -------------------------------------------------------------------------
// Lanes are queries. For R query rows and K keys: score[r][k] = sum over c of query[r][c] *
// column[c][offset + k], where `query` is [R][steps][W] and `column` is [steps][pitch], of Floats
// or Pairs. Each key is loaded once for the R rows.
struct ScoreArgs {
  const float* query;
  int steps;
  float scale;  // for Pairs; Floats are scaled already
  const float* column;
  size_t pitch;
  const int32_t* offset;
  float* score;
  size_t score_pitch;  // between query rows
};

// Keys come from the L2 cache. Loads that cross cache lines stall unless the lines are prefetched.
constexpr int CHANNELS_AHEAD = 16;

template <class P, int R, int K, int FETCH>
static void score_kernel(const ScoreArgs& args) {
  const ScoreArgs a = args;  // a copy, as stores through float pointers might alias `args`
  // With a single query row, loads across cache lines would take longer than the arithmetic.
  constexpr bool RUN = FETCH == DIRECT && R == 1;
  F sum[R][K];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int k = 0; k < K; k++) sum[r][k] = simd::zero();
  }
  const float* column = a.column;
  const float* query = a.query;
  for (int c = 0; c < a.steps; c++, column += a.pitch, query += W) {
    F low = simd::zero(), high = low, run[K], q[R];
    if constexpr (RUN) simd::load_run(column, run, std::make_index_sequence<K>());
    if (FETCH == DIRECT || FETCH == PERMUTE || FETCH == PERMUTE_TWO) {
      // Past the last channel, this prefetches the next key row.
      __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch);
      __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch + W);
      if (FETCH == DIRECT) __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch + W + K - 1);
    }
    if (FETCH == PERMUTE_TWO) {
      low = simd::load(column);
      high = simd::load(column + W);
    }
    VB_UNROLL
    for (int r = 0; r < R; r++) q[r] = simd::load(query + static_cast<size_t>(r) * a.steps * W);
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      const F key = simd::in_register(
          RUN                    ? run[k]
          : FETCH == DIRECT      ? simd::load(column + k)
          : FETCH == PERMUTE     ? simd::permute(simd::load(column + k), a.offset)
          : FETCH == PERMUTE_TWO ? simd::permute(low, high, a.offset, k)
          : FETCH == GATHER      ? simd::gather(column + k, a.offset)
                                 : simd::set1(column[k]));
      VB_UNROLL
      for (int r = 0; r < R; r++) P::add_product(sum[r][k], q[r], key);
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int k = 0; k < K; k++) {
      const F scaled = P::COUNT == 1 ? sum[r][k] : sum[r][k] * simd::set1(a.scale);
      simd::store(a.score + r * a.score_pitch + k * W, scaled);
    }
  }
}

// ---- weighted sum of keys: o += p . v ----------------------------------------------------------
// Lanes are channels. For L adjacent queries of each of R query rows, and C vectors of channels:
// sum[r][l] += sum over the key rows that r sees, and their keys, of
//              weight[r][key row][key][lane l] * values[start(l) + key].
// The weights are scalars broadcast from the score buffer, so neither v nor o is transposed. Pairs
// of weights, like pairs of values, belong to a key and the next one.
struct KeyRow {
  const float* values;   // [position][channel]
  const float* weights;  // for query row 0: [key or pair of keys][W]
  int row, row_count;    // the query rows that see it
};
struct MixArgs {
  const KeyRow* rows;
  int row_count;
  int channel;      // the first channel
  size_t pitch;     // between positions
  size_t start[4];  // element offset of the first key, per lane
  int keys;
  int lane;                 // the first lane
  size_t weight_row_pitch;  // between query rows
  float* sum;               // [R][L][channel]
  size_t sum_row_pitch;     // between query rows
  bool fresh;               // start from zero rather than `sum`
};

// Adds a position's values times the weights of one lane of query rows FIRST .. FIRST + COUNT - 1.
template <class P, int FIRST, int COUNT, int R, int C>
static VB_INLINE void add_values(const MixArgs& a, const float* weight, const F (&v)[C],
                                 F (&sum)[R][C]) {
  VB_UNROLL
  for (int r = FIRST; r < FIRST + COUNT; r++) {
    const F p = simd::in_register(simd::set1(weight[r * a.weight_row_pitch]));
    VB_UNROLL
    for (int c = 0; c < C; c++) P::add_product(sum[r][c], p, v[c]);
  }
}

// Loads the channels of one position; with LAST, without those of the next one in Pairs.
template <class P, bool LAST, int C>
static VB_INLINE void load_values(const float* value, F (&v)[C]) {
  VB_UNROLL
  for (int c = 0; c < C; c++) {
    F x = simd::load(value + c * W);
    if constexpr (LAST && P::COUNT == 2) x = P::without_second(x);
    v[c] = simd::in_register(x);
  }
}

// Adds one key row for the query rows FIRST .. FIRST + COUNT - 1.
template <class P, int FIRST, int COUNT, int R, int C, int L>
static VB_INLINE void mix_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  const float* weight = row.weights + a.lane;
  const float* value[L];
  VB_UNROLL
  for (int l = 0; l < L; l++) value[l] = row.values + a.channel + a.start[l];
  for (int k = P::COUNT; k <= a.keys; k += P::COUNT, weight += W) {
    VB_UNROLL
    for (int l = 0; l < L; l++) {
      F v[C];
      load_values<P, false>(value[l], v);
      value[l] += P::COUNT * a.pitch;
      add_values<P, FIRST, COUNT>(a, weight + l, v, sum[l]);
    }
  }
  if (a.keys % P::COUNT == 0) return;
  VB_UNROLL
  for (int l = 0; l < L; l++) {
    F v[C];
    load_values<P, true>(value[l], v);
    add_values<P, FIRST, COUNT>(a, weight + l, v, sum[l]);
  }
}

// The same if the windows of the L lanes start at consecutive positions and have at least L keys:
// each vector of values is loaded once for all lanes that start a step there.
template <class P, int FIRST, int COUNT, int R, int C, int L>
static VB_INLINE void slide_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  static_assert(L % P::COUNT == 0);
  constexpr int AT_ONCE = L / P::COUNT;
  const float* value = row.values + a.channel + a.start[0];
  const float* weight = row.weights + a.lane;  // of lane 0
  // The next P::COUNT positions. At each of them, every P::COUNT-th lane starts a step; of these
  // lanes, `first` to `last` are within their windows. With `ends`, it is the last key of the
  // first.
  const auto add = [&](int first, int last, bool ends) VB_INLINE_LAMBDA {
    VB_UNROLL
    for (int i = 0; i < P::COUNT; i++, value += a.pitch) {
      F v[C], v_end[C];
      load_values<P, false>(value, v);
      if (ends) load_values<P, true>(value, v_end);
      VB_UNROLL
      for (int n = 0; n < AT_ONCE; n++) {
        if (n < first || n > last) continue;
        const int l = P::COUNT * n + i;
        add_values<P, FIRST, COUNT>(a, weight + l - n * W, ends && n == first ? v_end : v, sum[l]);
      }
    }
    weight += W;
  };
  const int count = simd::steps<P>(a.keys);
  VB_UNROLL
  for (int k = 0; k < AT_ONCE - 1; k++) add(0, k, false);
  for (int k = AT_ONCE - 1; k < count - 1; k++) add(0, AT_ONCE - 1, false);
  // From here on, one lane after the other reaches its last step.
  if (a.keys % P::COUNT == 0) {
    VB_UNROLL
    for (int k = 0; k < AT_ONCE; k++) add(k, AT_ONCE - 1, false);
  } else {
    VB_UNROLL
    for (int k = 0; k < AT_ONCE; k++) add(k, AT_ONCE - 1, true);
  }
}

template <class P, int FIRST, int COUNT, bool SLIDES, int R, int C, int L>
static VB_INLINE void add_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  if constexpr (FIRST + COUNT > R) {
    __builtin_unreachable();
  } else if constexpr (SLIDES) {
    slide_row<P, FIRST, COUNT>(a, row, sum);
  } else {
    mix_row<P, FIRST, COUNT>(a, row, sum);
  }
}

template <class P, int R, int C, int L, bool SLIDES>
static void mix_kernel(const MixArgs& args) {
  const MixArgs a = args;
  F sum[L][R][C];
  VB_UNROLL
  for (int l = 0; l < L; l++) {
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int c = 0; c < C; c++) {
        sum[l][r][c] =
            a.fresh ? simd::zero() : simd::load(a.sum + r * a.sum_row_pitch + l * a.pitch + c * W);
      }
    }
  }
  for (const KeyRow *row = a.rows, *end = row + a.row_count; row < end; row++) {
    switch (row->row * 4 + row->row_count) {
      case 1: add_row<P, 0, 1, SLIDES>(a, *row, sum); break;
      case 2: add_row<P, 0, 2, SLIDES>(a, *row, sum); break;
      case 3: add_row<P, 0, 3, SLIDES>(a, *row, sum); break;
      case 5: add_row<P, 1, 1, SLIDES>(a, *row, sum); break;
      case 6: add_row<P, 1, 2, SLIDES>(a, *row, sum); break;
      case 9: add_row<P, 2, 1, SLIDES>(a, *row, sum); break;
    }
  }
  VB_UNROLL
  for (int l = 0; l < L; l++) {
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      VB_UNROLL
      for (int c = 0; c < C; c++)
        simd::store(a.sum + r * a.sum_row_pitch + l * a.pitch + c * W, sum[l][r][c]);
    }
  }
}

// ---- dispatch tables ---------------------------------------------------------------------------
constexpr int MAX_CHANNELS = simd::REGISTERS == 32 ? 4 : 2;  // vectors of channels at once in `mix`

// Lanes at once in `mix`: enough sums to hide the latency of the arithmetic.
static constexpr int mix_lanes(int rows) { return rows == 1 ? 4 : 2; }

// The same if windows slide, with as many channels as there are registers for sums.
constexpr int SLIDE_LANES = 4;
static constexpr int slide_channels(int rows) {
  return std::min(MAX_CHANNELS, simd::REGISTERS * 3 / 4 / (SLIDE_LANES * rows));
}

// [fetch][query rows - 1][keys - 1]. Static, since libraries for different instruction sets in one
// process would otherwise share it.
template <class P>
static constexpr auto SCORE = variants<5>([](auto fetch) {
  return variants<MAX_ROWS>([](auto r) {
    return variants<MAX_KEYS>([](auto k) {
      return score_kernel<P, decltype(r)::value, k.value, decltype(fetch)::value - 1>;
    });
  });
});

// Kernels for one lane, several lanes, and several lanes with sliding windows, indexed by the
// number of vectors of channels - 1.
using MixKernel = void (*)(const MixArgs&);
struct MixKernels {
  std::array<MixKernel, MAX_CHANNELS> one, several, sliding;
};
// [query rows - 1]
template <class P>
static constexpr auto MIX = variants<MAX_ROWS>([](auto r) {
  constexpr int R = r.value;
  return MixKernels{
      variants<MAX_CHANNELS>([](auto c) { return mix_kernel<P, R, c.value, 1, false>; }),
      variants<MAX_CHANNELS>([](auto c) { return mix_kernel<P, R, c.value, mix_lanes(R), false>; }),
      variants<MAX_CHANNELS>([](auto c) {
        return mix_kernel<P, R, std::min<int>(c.value, slide_channels(R)), SLIDE_LANES, true>;
      })};
});

}  // namespace na
