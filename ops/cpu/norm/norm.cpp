// Norms: the C interface, called from layer_norm.py and rms_norm.py.
#include "common/interface.h"
#include "norm/norm.h"
#include "norm/rms.h"

VB_EXPORT_BYTES(norm, Problem)
VB_EXPORT_BYTES(norm, Tensors)
VB_EXPORT_BYTES(rms, Problem)
VB_EXPORT_BYTES(rms, Tensors)

extern "C" int norm_forward(const norm::Problem* problem, const norm::Tensors* tensors) {
  return status_of([&] { norm::forward(*problem, *tensors); });
}

extern "C" int rms_norm_forward(const rms::Problem* problem, const rms::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? rms::forward<BFloat16>(*problem, *tensors)
                      : rms::forward<float>(*problem, *tensors);
  });
}
