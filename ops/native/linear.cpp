// Linear layers on the CPU: the plain C interface, see depthwise.cpp. Called from ops/linear.py.
#include <new>

#include "linear.h"

extern "C" {

// Floats of a packed weight.
int64_t linear_packed_size(int64_t out_features, int64_t in_features) {
  return linear::padded(out_features) * in_features;
}

void linear_pack(const float* weight, int64_t out_features, int64_t in_features, float* out) {
  linear::pack(weight, out_features, in_features, out);
}

// Returns 0, or 1 where memory ran out.
int linear_forward(const linear::Problem* problem, const linear::Tensors* tensors) {
  try {
    linear::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
