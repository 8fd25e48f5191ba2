// Means of windows on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/pooling.py.
#include <new>

#include "pooling.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int pooling_forward(const pooling::Problem* problem, const void* in, void* out) {
  try {
    pooling::forward(*problem, in, out);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
