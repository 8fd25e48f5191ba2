// Neighborhood attention: the C interface, called from attention.py.
#include "common/interface.h"
#include "neighborhood/backward.h"
#include "neighborhood/forward.h"

VB_EXPORT_BYTES(na, Problem)
VB_EXPORT_BYTES(na, ForwardTensors)
VB_EXPORT_BYTES(na, BackwardTensors)

extern "C" int na_forward(const na::Problem* problem, const na::ForwardTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? na::forward<BFloat16>(*problem, *tensors)
                      : na::forward<float>(*problem, *tensors);
  });
}

extern "C" int na_backward(const na::Problem* problem, const na::BackwardTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? na::backward<BFloat16>(*problem, *tensors)
                      : na::backward<float>(*problem, *tensors);
  });
}
