// A linear layer with a fused prologue and epilogue: scales of inputs, activation, shortcut or
// gate, energies of outputs. Blocks of rows are multiplied with all the weights.
#pragma once
#include "gemm/int8.h"

namespace linear {

constexpr int64_t THREAD_ROWS = 32;  // at least
// Bytes of hidden values per block of rows, and the fewest rows that justify reading the weights
// again.
constexpr int64_t PAIR_BYTES = 1 << 19, MIN_PAIR_ROWS = 384;

// Rows a multiple of this apart have the same set of the L1 cache, too small for those of a
// micro-kernel. Of 196 rows of 1024 floats, 256 outputs take 0.94 instead of 1.21 ms if the rows are
// copied, further apart, for several panels.
constexpr int64_t CONFLICT_BYTES = 4096, FEWEST_PANELS = 4;

template <class T>
static bool rows_conflict(int64_t stride) {
  return !has_tiles() && stride * int64_t{sizeof(T)} % CONFLICT_BYTES == 0;
}

static void run_panels(const Problem& p, const Tensors& t, const Rows<float>& rows, Range panels) {
  run_in_registers(p, t, rows, panels);
}
static void run_panels(const Problem& p, const Tensors& t, const Rows<BFloat16>& rows,
                       Range panels) {
  has_tiles() ? run_tiles(p, t, rows, panels) : run_in_registers(p, t, rows, panels);
}

// Copies `count` values, times `scale` unless it is null, and zeros up to `padded`.
template <class T>
static void copy_row(const T* in, const float* scale, int64_t count, int64_t padded,
                     Input<T>* out) {
  if constexpr (std::is_same_v<Input<T>, T>) {
    if (!scale) simd::copy(in, count, out);
  }
  if (scale || !std::is_same_v<Input<T>, T>) {
    for (int64_t k = 0; k < count; k += W) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, count - k));
      const F x = simd::get(in + k, lanes);
      simd::put(out + k, scale ? x * simd::get(scale + k, lanes) : x, lanes);
    }
  }
  std::fill(out + count, out + padded, Input<T>{});
}

// The scales of an image, of `count` for each, or null. Those in bfloat16 are converted.
static const float* scales_of(const void* scales, bool half, int64_t count, int64_t image,
                              ScratchBuffer<float>& buffer) {
  if (!scales) return nullptr;
  if (!half) return static_cast<const float*>(scales) + image * count;
  float* const wide = buffer.of(count);
  for (int64_t k = 0; k < count; k++) {
    wide[k] = simd::to_float(static_cast<const BFloat16*>(scales)[image * count + k]);
  }
  return wide;
}

// Rows `range` of one image, or of all images if there are no scales, gates or energies.
template <class T>
static void run_rows(const Problem& p, Tensors t, Range range, Range panels) {
  static thread_local ScratchBuffer<Input<T>> buffer;
  static thread_local ScratchBuffer<float> wide_scales, wide_gates;
  const int64_t image = p.image_rows ? range.begin / p.image_rows : 0;
  const T* const in = static_cast<const T*>(t.in);
  const int64_t padded = padded_inputs(in, p.in_features);
  const bool conflicts = rows_conflict<T>(p.in_stride) && length(panels) >= FEWEST_PANELS;
  const int64_t pitch = padded + (conflicts ? LINE / int64_t{sizeof(Input<T>)} : 0);
  const int64_t fitting = std::max(MIN_CHUNK, CHUNK_BYTES / (pitch * int64_t{sizeof(Input<T>)}));
  const int64_t count = range.end - range.begin, chunks = (count + fitting - 1) / fitting;
  const float* const scale = scales_of(t.scale, p.half_scale, p.in_features, image, wide_scales);
  if (t.gate) t.other_scale = scales_of(t.gate, p.bfloat16, p.out_features, image, wide_gates);
  for (int64_t i = 0; i < chunks; i++) {
    const Range chunk = share(count, i, chunks);
    const int64_t first = range.begin + chunk.begin;
    const T* const begin = in + (in ? first * p.in_stride : 0);
    Rows<T> rows{nullptr, p.in_stride, p.in_features, nullptr,
                 static_cast<T*>(t.out) + first * p.out_stride, nullptr, chunk.end - chunk.begin};
    if (t.other) rows.other = static_cast<const T*>(t.other) + first * p.other_stride;
    if (t.energy) rows.energy = t.energy + image * p.out_features;
    if (t.bytes) {
      run_given_bytes(p, t, first, rows, panels);
      continue;
    }
    if (t.weight_scale) {
      run_quantised(p, t, begin, scale, rows, panels);
      continue;
    }
    if constexpr (std::is_same_v<Input<T>, T>) {
      const bool in_place = takes_rows_in_place(in, p.in_features, rows.count);
      if (in_place && !t.scale && !conflicts) rows.in = begin;
    }
    if (!rows.in) {
      Input<T>* const copied = buffer.of(round_up(rows.count, TILE_ROWS) * pitch);
      for (int64_t r = 0; r < rows.count; r++) {
        copy_row(begin + r * p.in_stride, scale, p.in_features, padded, copied + r * pitch);
      }
      rows.in = copied;
      rows.in_stride = pitch;
      // Only whole tiles are read.
      rows.in_features = has_tiles() ? padded : round_up(p.in_features, INPUTS<T>);
    }
    run_panels(p, t, rows, panels);
  }
}

// Whether threads split the panels, so that each reads fewer weights, instead of the rows. Cache
// lines that several threads have read are slow to write: the other cores' copies must be
// invalidated first.
static bool shares_panels(const Problem& p) {
  return p.out_features > 8 * p.rows || p.rows < THREAD_ROWS * p.threads;
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t panels = (p.out_features + PANEL - 1) / PANEL;
  if (t.energy) {
    std::fill_n(t.energy, p.rows / p.image_rows * p.out_features, 0.f);
  }
  const bool by_panels = t.energy || shares_panels(p);
  const int64_t threads = std::max<int64_t>(1, std::min(p.threads, by_panels ? panels : p.rows));
  const auto work = [&](int64_t index) {
    const Range own_panels = by_panels ? share(panels, index, threads) : Range{0, panels};
    const Range own = by_panels ? Range{0, p.rows} : share(p.rows, index, threads);
    const int64_t image_rows = p.image_rows ? p.image_rows : p.rows;
    for (int64_t row = own.begin; row < own.end;) {
      const int64_t end = std::min(own.end, (row / image_rows + 1) * image_rows);
      run_rows<T>(p, t, {row, end}, own_panels);
      row = end;
    }
  };
  parallel::for_each(threads, threads, work);
}

// Two layers, a block of rows at a time; the hidden rows between them stay in the cache.
template <class T>
static void forward_pair(Problem first, Tensors before, Problem second, Tensors after) {
  static thread_local ScratchBuffer<T> buffer;
  constexpr int64_t line = LINE / int64_t{sizeof(T)};
  // An odd number of cache lines, so that rows do not map to the same sets of the L1 cache.
  const int64_t pitch = (round_up(first.out_features, line) / line | 1) * line;
  const int64_t fitting = std::max(MIN_PAIR_ROWS, PAIR_BYTES / (pitch * int64_t{sizeof(T)}));
  const int64_t count = first.rows, chunks = (count + fitting - 1) / fitting;
  T* const hidden = buffer.of(std::min(count, fitting) * pitch);
  first.out_stride = second.in_stride = pitch;
  before.out = hidden;
  for (int64_t i = 0; i < chunks; i++) {
    const Range rows = share(count, i, chunks);
    Tensors expand = before, project = after;
    first.rows = second.rows = rows.end - rows.begin;
    expand.in = static_cast<const T*>(before.in) + rows.begin * first.in_stride;
    project.in = hidden;
    project.out = static_cast<T*>(after.out) + rows.begin * second.out_stride;
    if (after.other) {
      project.other = static_cast<const T*>(after.other) + rows.begin * second.other_stride;
    }
    forward<T>(first, expand);
    forward<T>(second, project);
  }
}

}  // namespace linear
