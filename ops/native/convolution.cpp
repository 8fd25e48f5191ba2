// Convolutions of all channels on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/convolution.py.
#include <new>

#include "convolution.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int convolution_forward(const convolution::Problem* problem, const convolution::Tensors* tensors) {
  try {
    convolution::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
