// Norms: the C interface, called from the Python files beside it.
#include "common/interface.h"
#include "norm/attention_weights.h"
#include "norm/norm.h"
#include "norm/response.h"
#include "norm/rms.h"
#include "norm/softmax.h"

VB_EXPORT_BYTES(norm, Problem)
VB_EXPORT_BYTES(norm, Tensors)
VB_EXPORT_BYTES(response, Problem)
VB_EXPORT_BYTES(response, Tensors)
VB_EXPORT_BYTES(rms, Problem)
VB_EXPORT_BYTES(rms, Tensors)
VB_EXPORT_BYTES(softmax, Problem)
VB_EXPORT_BYTES(softmax, Tensors)
VB_EXPORT_BYTES(weights, Problem)
VB_EXPORT_BYTES(weights, Tensors)

extern "C" int norm_forward(const norm::Problem* problem, const norm::Tensors* tensors) {
  return status_of([&] { norm::forward(*problem, *tensors); });
}

extern "C" int rms_norm_forward(const rms::Problem* problem, const rms::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? rms::forward<BFloat16>(*problem, *tensors)
                      : rms::forward<float>(*problem, *tensors);
  });
}

extern "C" int response_scales_forward(const response::Problem* problem,
                                       const response::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? response::forward<BFloat16>(*problem, *tensors)
                      : response::forward<float>(*problem, *tensors);
  });
}

extern "C" int biased_softmax_forward(const softmax::Problem* problem,
                                      const softmax::Tensors* tensors) {
  return status_of([&] { softmax::forward(*problem, *tensors); });
}

extern "C" int attention_weights_forward(const weights::Problem* problem,
                                         const weights::Tensors* tensors) {
  return status_of([&] { weights::forward(*problem, *tensors); });
}
