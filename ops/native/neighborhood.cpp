// Neighborhood attention on the CPU: the plain C interface, without any header of torch, so that it
// compiles in seconds and one library serves every version of torch. Called through ctypes from
// ops/neighborhood/cpu.py.
#include "backward.h"
#include "forward.h"

extern "C" {

// Both return 0, or 1 where memory ran out.
int na_forward(const na::Problem* problem, const na::ForwardTensors* tensors) {
  try {
    if (problem->bfloat16) {
      na::forward<BFloat16>(*problem, *tensors);
    } else {
      na::forward<float>(*problem, *tensors);
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

int na_backward(const na::Problem* problem, const na::BackwardTensors* tensors) {
  try {
    if (problem->bfloat16) {
      na::backward<BFloat16>(*problem, *tensors);
    } else {
      na::backward<float>(*problem, *tensors);
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
