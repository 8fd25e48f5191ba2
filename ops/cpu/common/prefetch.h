// Memory that is brought into the first-level cache before it is wanted.
#pragma once
#include <cstdint>
#include "common/simd.h"

namespace memory {

constexpr int64_t LINE = 64;  // bytes

// What is written has to be there, too: stores are made one after the other, and each waits for its
// line where that is not in a cache of the core's.
enum Use { READ, WRITE };

template <Use use, class T>
static VB_INLINE void fetch(const T* begin, int64_t count) {
  const char* place = reinterpret_cast<const char*>(begin);
  const char* const end = reinterpret_cast<const char*>(begin + count);
  for (; place < end; place += LINE) __builtin_prefetch(place, use, 3);
}

}  // namespace memory
