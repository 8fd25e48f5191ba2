// The two register-blocked products of neighborhood attention; the third, in `spread.h`, is the
// transpose of one of them.
#pragma once
#include <array>
#include <utility>

#include "geometry.h"

namespace na {

using simd::F;
using simd::W;

// ---- scores: s = q . k -------------------------------------------------------------------------
// One lane a query. For R query rows and K keys: score[r][k] = sum over c of query[r][c] *
// column[c][offset + k], where `query` is [R][dim][W] and `column` is [dim][pitch]. Each key is
// fetched once for the R rows.
struct ScoreArgs {
  const float* query;
  int dim;
  const float* column;
  size_t pitch;
  const int32_t* offset;
  float* score;
  size_t score_pitch;  // from one query row to the next
};

// Keys come from the second-level cache; where a load lies across two lines of it, the processor
// waits for them unless they are on their way.
constexpr int CHANNELS_AHEAD = 16;

template <int R, int K, int FETCH>
static void score_kernel(const ScoreArgs& args) {
  const ScoreArgs a = args;  // a copy, which stores through float pointers cannot change
  // With one query row only, loads across cache lines would take longer than the arithmetic.
  constexpr bool RUN = FETCH == DIRECT && R == 1;
  F sum[R][K];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int k = 0; k < K; k++) sum[r][k] = simd::zero();
  }
  const float* column = a.column;
  const float* query = a.query;
  for (int c = 0; c < a.dim; c++, column += a.pitch, query += W) {
    F low = simd::zero(), high = low, run[K], q[R];
    if constexpr (RUN) simd::load_run(column, run, std::make_index_sequence<K>());
    if (FETCH == DIRECT || FETCH == PERMUTE || FETCH == PERMUTE_TWO) {
      // Behind the last channel lies the next key row.
      __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch);
      __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch + W);
      if (FETCH == DIRECT) __builtin_prefetch(column + CHANNELS_AHEAD * a.pitch + W + K - 1);
    }
    if (FETCH == PERMUTE_TWO) {
      low = simd::load(column);
      high = simd::load(column + W);
    }
    VB_UNROLL
    for (int r = 0; r < R; r++) q[r] = simd::load(query + static_cast<size_t>(r) * a.dim * W);
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
      for (int r = 0; r < R; r++) sum[r][k] = simd::fma(q[r], key, sum[r][k]);
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int k = 0; k < K; k++) simd::store(a.score + r * a.score_pitch + k * W, sum[r][k]);
  }
}

// ---- weighted sum of keys: o += p . v ----------------------------------------------------------
// One lane a channel. For L neighbouring queries of each of R query rows, C vectors of channels:
// sum[r][l] += sum over the key rows that r sees, and their keys, of
//              weight[r][key row][key][lane l] * values[start(l) + key].
// The weights are scalars that are broadcast from the score buffer, so neither v nor o is ever
// transposed.
struct KeyRow {
  const float* values;   // [position][channel]
  const float* weights;  // of query row 0: [key][W]
  int row, row_count;    // the query rows that see it
};
struct MixArgs {
  const KeyRow* rows;
  int row_count;
  int channel;      // the first of the channels wanted
  size_t pitch;     // from one position to the next
  size_t start[4];  // element offset of the first key, for each of the L lanes
  int keys;
  int lane;                 // the first of the lanes
  size_t weight_row_pitch;  // from one query row to the next
  float* sum;               // [R][L][channel]
  size_t sum_row_pitch;     // from one query row to the next
  bool fresh;               // start from zero instead of from `sum`
};

// One key row for the query rows FIRST .. FIRST + COUNT - 1.
template <int FIRST, int COUNT, int R, int C, int L>
static VB_INLINE void mix_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  const float* weight = row.weights + a.lane;
  const float* value[L];
  VB_UNROLL
  for (int l = 0; l < L; l++) value[l] = row.values + a.channel + a.start[l];
  for (int k = 0; k < a.keys; k++, weight += W) {
    VB_UNROLL
    for (int l = 0; l < L; l++) {
      F v[C];
      VB_UNROLL
      for (int c = 0; c < C; c++) v[c] = simd::in_register(simd::load(value[l] + c * W));
      value[l] += a.pitch;
      VB_UNROLL
      for (int r = FIRST; r < FIRST + COUNT; r++) {
        const F p = simd::in_register(simd::set1(weight[r * a.weight_row_pitch + l]));
        VB_UNROLL
        for (int c = 0; c < C; c++) sum[l][r][c] = simd::fma(p, v[c], sum[l][r][c]);
      }
    }
  }
}

// The same where the windows of the L lanes start one position after the other and hold L keys or
// more: each vector of values is loaded once for all of them.
template <int FIRST, int COUNT, int R, int C, int L>
static VB_INLINE void slide_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  const float* value = row.values + a.channel + a.start[0];
  const float* weight = row.weights + a.lane;  // of lane 0; those of lane l lie l keys before
  // The next position, which the lanes from `first` to `last` see.
  const auto add = [&](int first, int last) VB_INLINE_LAMBDA {
    F v[C];
    VB_UNROLL
    for (int c = 0; c < C; c++) v[c] = simd::in_register(simd::load(value + c * W));
    VB_UNROLL
    for (int l = 0; l < L; l++) {
      if (l < first || l > last) continue;
      VB_UNROLL
      for (int r = FIRST; r < FIRST + COUNT; r++) {
        const F p = simd::in_register(simd::set1(weight[r * a.weight_row_pitch + l - l * W]));
        VB_UNROLL
        for (int c = 0; c < C; c++) sum[l][r][c] = simd::fma(p, v[c], sum[l][r][c]);
      }
    }
    value += a.pitch;
    weight += W;
  };
  VB_UNROLL
  for (int k = 0; k < L - 1; k++) add(0, k);
  for (int k = L - 1; k < a.keys; k++) add(0, L - 1);
  VB_UNROLL
  for (int k = 1; k < L; k++) add(k, L - 1);
}

template <int FIRST, int COUNT, bool SLIDES, int R, int C, int L>
static VB_INLINE void add_row(const MixArgs& a, const KeyRow& row, F (&sum)[L][R][C]) {
  if constexpr (FIRST + COUNT > R) {
    __builtin_unreachable();
  } else if constexpr (SLIDES) {
    slide_row<FIRST, COUNT>(a, row, sum);
  } else {
    mix_row<FIRST, COUNT>(a, row, sum);
  }
}

template <int R, int C, int L, bool SLIDES>
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
      case 1:
        add_row<0, 1, SLIDES>(a, *row, sum);
        break;
      case 2:
        add_row<0, 2, SLIDES>(a, *row, sum);
        break;
      case 3:
        add_row<0, 3, SLIDES>(a, *row, sum);
        break;
      case 5:
        add_row<1, 1, SLIDES>(a, *row, sum);
        break;
      case 6:
        add_row<1, 2, SLIDES>(a, *row, sum);
        break;
      case 9:
        add_row<2, 1, SLIDES>(a, *row, sum);
        break;
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

// And where their windows slide, with as many channels as sums fit the registers.
constexpr int SLIDE_LANES = 4;
static constexpr int slide_channels(int rows) {
  return std::min(MAX_CHANNELS, simd::REGISTERS * 3 / 4 / (SLIDE_LANES * rows));
}

using ScoreKernel = void (*)(const ScoreArgs&);
using MixKernel = void (*)(const MixArgs&);

template <int R, int FETCH, int... K>
static constexpr std::array<ScoreKernel, MAX_KEYS> score_row(std::integer_sequence<int, K...>) {
  return {score_kernel<R, K + 1, FETCH>...};
}
template <int FETCH>
static constexpr std::array<std::array<ScoreKernel, MAX_KEYS>, MAX_ROWS> score_rows() {
  constexpr auto keys = std::make_integer_sequence<int, MAX_KEYS>();
  return {score_row<1, FETCH>(keys), score_row<2, FETCH>(keys), score_row<3, FETCH>(keys)};
}
// [fetch][query rows - 1][keys - 1]
static constexpr std::array<std::array<std::array<ScoreKernel, MAX_KEYS>, MAX_ROWS>, 5> SCORE = {
    score_rows<DIRECT>(), score_rows<PERMUTE>(), score_rows<PERMUTE_TWO>(), score_rows<GATHER>(),
    score_rows<BROADCAST>()};

// For tiles of some query rows: one lane, several, several whose windows slide; by the vectors of
// channels - 1.
struct MixKernels {
  MixKernel one[MAX_CHANNELS], several[MAX_CHANNELS], sliding[MAX_CHANNELS];
};
template <int R, int... C>
static constexpr MixKernels mix_kernels(std::integer_sequence<int, C...>) {
  constexpr int most = slide_channels(R);
  return {{mix_kernel<R, C + 1, 1, false>...},
          {mix_kernel<R, C + 1, mix_lanes(R), false>...},
          {mix_kernel<R, std::min(C + 1, most), SLIDE_LANES, true>...}};
}
template <int... R>
static constexpr std::array<MixKernels, MAX_ROWS> mix_rows(std::integer_sequence<int, R...>) {
  return {mix_kernels<R + 1>(std::make_integer_sequence<int, MAX_CHANNELS>())...};
}
// [query rows - 1]
static constexpr std::array<MixKernels, MAX_ROWS> MIX =
    mix_rows(std::make_integer_sequence<int, MAX_ROWS>());

}  // namespace na
