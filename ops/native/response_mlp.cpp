// Feed-forwards with a response norm inside, on the CPU: the plain C interface, see depthwise.cpp.
// Called from ops/inference/response_mlp.py.
#include <new>

#include "response_mlp.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int response_mlp_forward(const response_mlp::Problem* problem,
                         const response_mlp::Tensors* tensors) {
  try {
    response_mlp::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
