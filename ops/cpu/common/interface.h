// The C interface of a library: its functions return 0, or 1 where memory ran out, and it says how
// many bytes its structures have, which ops/cpu/binding.py compares with those it fills in.
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
