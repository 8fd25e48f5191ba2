// Linear layers and convolutions: the C interface, called from linear.py, mlp.py and
// convolution.py.
#include "common/interface.h"
#include "gemm/convolution.h"

VB_EXPORT_BYTES(linear, Problem)
VB_EXPORT_BYTES(linear, Tensors)
VB_EXPORT_BYTES(convolution, Problem)
VB_EXPORT_BYTES(convolution, Tensors)

// Whether this CPU has products of bfloat16; if not, layers convert it to float32.
extern "C" int linear_multiplies_bfloat16() { return VB_BFLOAT16; }

// The number of elements of a packed weight.
extern "C" int64_t linear_packed_size(int64_t out_features, int64_t in_features, int bfloat16) {
  return bfloat16 ? linear::packed_size(static_cast<BFloat16*>(nullptr), out_features, in_features)
                  : linear::packed_size(static_cast<float*>(nullptr), out_features, in_features);
}

extern "C" void linear_pack(const void* weight, int64_t out_features, int64_t in_features,
                            int bfloat16, void* out) {
  if (bfloat16) {
    linear::pack(static_cast<const BFloat16*>(weight), out_features, in_features,
                 static_cast<BFloat16*>(out));
  } else {
    linear::pack(static_cast<const float*>(weight), out_features, in_features,
                 static_cast<float*>(out));
  }
}

// Whether this CPU multiplies int8.
extern "C" int linear_multiplies_bytes() { return linear::has_int8_products(); }

extern "C" int64_t linear_packed_bytes(int64_t out_features, int64_t in_features) {
  return linear::packed_bytes(out_features, in_features);
}

extern "C" void linear_pack_bytes(const int8_t* weight, int64_t out_features, int64_t in_features,
                                  int8_t* out) {
  linear::pack(weight, out_features, in_features, out);
}

extern "C" int linear_forward(const linear::Problem* problem, const linear::Tensors* tensors) {
  return status_of([&] { linear::forward(*problem, *tensors); });
}

// Two layers in sequence; the intermediate is never materialised.
extern "C" int linear_forward_pair(const linear::Problem* first, const linear::Tensors* before,
                                   const linear::Problem* second, const linear::Tensors* after) {
  return status_of([&] { linear::forward_pair(*first, *before, *second, *after); });
}

extern "C" int convolution_forward(const convolution::Problem* problem,
                                   const convolution::Tensors* tensors) {
  return status_of([&] { convolution::forward(*problem, *tensors); });
}
