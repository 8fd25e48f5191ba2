// Ranges of rows, columns or channels.
#pragma once
#include <cstdint>

struct Range {
  int64_t begin, end;
};

static inline int64_t length(Range range) { return range.end - range.begin; }

// Part `index` of `count` items in equal shares.
static inline Range share(int64_t count, int64_t index, int64_t shares) {
  return {count * index / shares, count * (index + 1) / shares};
}
