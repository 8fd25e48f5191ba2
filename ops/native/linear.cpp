// Linear layers on the CPU, and convolutions by them: the plain C interface, see depthwise.cpp. Called
// from ops/linear.py, ops/packed_mlp.py and ops/inference/convolution.py.
#include <new>

#include "convolution.h"
#include "linear.h"

extern "C" {

// Whether this CPU has products of bfloat16, else layers make it float32 first.
int linear_multiplies_bfloat16() { return VB_BFLOAT16; }

// Elements of a packed weight.
int64_t linear_packed_size(int64_t out_features, int64_t in_features, int bfloat16) {
  return bfloat16 ? linear::packed_size(static_cast<BFloat16*>(nullptr), out_features, in_features)
                  : linear::packed_size(static_cast<float*>(nullptr), out_features, in_features);
}

void linear_pack(const void* weight, int64_t out_features, int64_t in_features, int bfloat16,
                 void* out) {
  if (bfloat16) {
    linear::pack(static_cast<const BFloat16*>(weight), out_features, in_features,
                 static_cast<BFloat16*>(out));
  } else {
    linear::pack(static_cast<const float*>(weight), out_features, in_features,
                 static_cast<float*>(out));
  }
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

// Two layers, one after the other, of as many rows; what is between them is nowhere to be seen.
int linear_forward_pair(const linear::Problem* first, const linear::Tensors* before,
                        const linear::Problem* second, const linear::Tensors* after) {
  try {
    linear::forward_pair(*first, *before, *second, *after);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

int convolution_forward(const convolution::Problem* problem, const convolution::Tensors* tensors) {
  try {
    convolution::forward(*problem, *tensors);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
