// Bi-WKV on the CPU: the C interface. Called from bi_wkv.py beside it.
#include "common/interface.h"
#include "wkv/backward.h"
#include "wkv/forward.h"

VB_EXPORT_BYTES(wkv, Problem)
VB_EXPORT_BYTES(wkv, Tensors)
VB_EXPORT_BYTES(wkv, GradTensors)

extern "C" int wkv_forward(const wkv::Problem* problem, const wkv::Tensors* tensors) {
  return status_of([&] { wkv::forward(*problem, *tensors); });
}

extern "C" int wkv_backward(const wkv::Problem* problem, const wkv::GradTensors* tensors) {
  return status_of([&] { wkv::backward(*problem, *tensors); });
}
