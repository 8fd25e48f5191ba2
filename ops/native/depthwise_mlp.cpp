// Feed-forwards with a depthwise convolution inside, on the CPU: the plain C interface, see
// depthwise.cpp. Called from ops/inference/depthwise_mlp.py.
#include <new>

#include "depthwise_mlp.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int depthwise_mlp_forward(const depthwise_mlp::Problem* problem,
                          const depthwise_mlp::Tensors* tensors) {
  try {
    depthwise_mlp::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
