// Depthwise convolution on the CPU: the plain C interface, without any header of torch, so that it
// compiles in seconds and one library serves every version of torch. Called through ctypes from
// ops/depthwise.py.
#include <new>

#include "depthwise_branches.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int depthwise_forward(const depthwise::Problem* problem, const depthwise::Tensors* tensors) {
  try {
    if (problem->bfloat16) {
      depthwise::forward_any<BFloat16>(*problem, *tensors);
    } else {
      depthwise::forward_any<float>(*problem, *tensors);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

int depthwise_branches(const depthwise::Problem* problems, const depthwise::Tensors* tensors,
                       int64_t count, int64_t passed) {
  try {
    if (problems->bfloat16) {
      depthwise::branches<BFloat16>(problems, tensors, count, passed);
    } else {
      depthwise::branches<float>(problems, tensors, count, passed);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
