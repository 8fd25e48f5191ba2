// Ranges of rows, columns or channels.
#pragma once
#include <algorithm>
#include <cstdint>

struct Range {
  int64_t begin, end;
};

static inline int64_t length(Range range) { return range.end - range.begin; }

// Part `index` of `count` items in equal shares.
static inline Range share(int64_t count, int64_t index, int64_t shares) {
  return {count * index / shares, count * (index + 1) / shares};
}

// The output pixels along an axis whose windows do not reach beyond the map.
[[maybe_unused]] static Range inner_pixels(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                                           int64_t padding) {
  const int64_t begin = std::min(out, (padding + stride - 1) / stride);
  const int64_t room = in + padding - kernel;
  return {begin, std::max(begin, room < 0 ? 0 : std::min(out, room / stride + 1))};
}
