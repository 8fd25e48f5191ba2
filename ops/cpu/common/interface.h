// The C interface of a library. Functions return 0, or 1 if they ran out of memory. The library
// reports the sizes of its structures, which ops/cpu/call/binding.py compares with its own.
#pragma once
#include <cstdint>
#include <exception>

template <class Work>
static int status_of(const Work& work) {
  try {
    work();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

#define VB_EXPORT_BYTES(space, structure) \
  extern "C" int64_t space##_##structure##_bytes() { return sizeof(space::structure); }
