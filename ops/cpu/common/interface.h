// The C interface of a library. Functions return 0, or 1 if they ran out of memory.
#pragma once
#include <exception>
#include "common/simd.h"

// Calls work(T{}) for the type of some tensors' elements.
template <class Work>
static void with_type(bool bfloat16, const Work& work) {
  bfloat16 ? work(BFloat16{}) : work(float{});
}

template <class Work>
static int status_of(const Work& work) {
  try {
    work();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

template <class Work>
static int status_of(bool bfloat16, const Work& work) {
  return status_of([&] { with_type(bfloat16, work); });
}
