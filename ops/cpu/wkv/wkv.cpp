// Bi-WKV and the mixtures before it: the C interface, called from bi_wkv.py and shift.py.
#include "common/interface.h"
#include "wkv/backward.h"
#include "wkv/forward.h"
#include "wkv/shift.h"

VB_EXPORT_BYTES(wkv, Problem)
VB_EXPORT_BYTES(wkv, Tensors)
VB_EXPORT_BYTES(wkv, GradTensors)
VB_EXPORT_BYTES(shift, Problem)
VB_EXPORT_BYTES(shift, Tensors)

extern "C" int wkv_forward(const wkv::Problem* problem, const wkv::Tensors* tensors) {
  return status_of([&] { wkv::forward(*problem, *tensors); });
}

extern "C" int wkv_backward(const wkv::Problem* problem, const wkv::GradTensors* tensors) {
  return status_of([&] { wkv::backward(*problem, *tensors); });
}

extern "C" int wkv_shifted_mixtures(const shift::Problem* problem, const shift::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? shift::mix<BFloat16>(*problem, *tensors)
                      : shift::mix<float>(*problem, *tensors);
  });
}
