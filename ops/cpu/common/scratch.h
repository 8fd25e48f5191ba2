// Scratch buffers of kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// Kept between calls, grown as needed, and aligned to cache lines: loads of vectors that cross a
// line take twice as long.
template <class T>
class ScratchBuffer {
 public:
  T* of(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + LINE;
    if (bytes_.size() < bytes) bytes_.resize(bytes);
    const auto place = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<T*>((place + LINE - 1) / LINE * LINE);
  }

 private:
  static constexpr size_t LINE = 64;
  std::vector<char> bytes_;
};
