// Prefetching into the L1 cache.
#pragma once
#include <cstdint>
#include "common/simd.h"

namespace memory {

constexpr int64_t LINE = 64;  // bytes

// Memory to be written is prefetched, too: stores retire in order, and each waits for its line
// unless that is in one of the core's caches.
enum Use { READ, WRITE };

template <Use use, class T>
static VB_INLINE void fetch(const T* begin, int64_t count) {
  const char* place = reinterpret_cast<const char*>(begin);
  const char* const end = reinterpret_cast<const char*>(begin + count);
  for (; place < end; place += LINE) __builtin_prefetch(place, use, 3);
}

}  // namespace memory
