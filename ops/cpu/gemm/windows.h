// Windows of convolutions.
#pragma once
#include <algorithm>
#include <cstdint>
#include "common/range.h"

// The output pixels along an axis whose windows do not reach beyond the map.
static Range inner_pixels(int64_t in, int64_t out, int64_t kernel, int64_t stride,
                          int64_t padding) {
  const int64_t begin = std::min(out, (padding + stride - 1) / stride);
  const int64_t room = in + padding - kernel;
  return {begin, std::max(begin, room < 0 ? 0 : std::min(out, room / stride + 1))};
}
