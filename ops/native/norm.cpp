// Layer norm on the CPU: the plain C interface, see depthwise.cpp. Called from ops/norm.py.
#include <new>

#include "norm.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int norm_forward(const norm::Problem* problem, const norm::Tensors* tensors) {
  try {
    norm::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
