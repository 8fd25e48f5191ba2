// Layer norm on the CPU: the C interface. Called from layer_norm.py beside it.
#include "common/interface.h"
#include "norm/norm.h"

VB_EXPORT_BYTES(norm, Problem)
VB_EXPORT_BYTES(norm, Tensors)

extern "C" int norm_forward(const norm::Problem* problem, const norm::Tensors* tensors) {
  return status_of([&] { norm::forward(*problem, *tensors); });
}
