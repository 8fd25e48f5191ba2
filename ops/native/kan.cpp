// Kolmogorov-Arnold layers on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/kan.py.
#include <new>

#include "kan.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int kan_forward(const kan::Problem* problem, const kan::Tensors* tensors) {
  try {
    kan::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
