// Deformable convolution on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/deformable.py.
#include <new>

#include "deformable.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int deformable_forward(const deformable::Problem* problem, const deformable::Tensors* tensors) {
  try {
    deformable::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
