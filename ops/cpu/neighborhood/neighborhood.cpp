// Neighborhood attention: the C interface, called from attention.py.
#include "common/interface.h"
#include "neighborhood/backward.h"
#include "neighborhood/dynamic.h"
#include "neighborhood/forward.h"
#include "neighborhood/split.h"

VB_EXPORT_BYTES(na, Problem)
VB_EXPORT_BYTES(na, ForwardTensors)
VB_EXPORT_BYTES(na, BackwardTensors)
VB_EXPORT_BYTES(na, SplitTensors)
VB_EXPORT_BYTES(na, DynamicTensors)
VB_EXPORT_BYTES(weights, Problem)

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

extern "C" int na_scores(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? na::scores<BFloat16>(*problem, *tensors)
                      : na::scores<float>(*problem, *tensors);
  });
}

extern "C" int na_mix(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? na::mix<BFloat16>(*problem, *tensors)
                      : na::mix<float>(*problem, *tensors);
  });
}

extern "C" int na_scatter(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? na::scatter<BFloat16>(*problem, *tensors)
                      : na::scatter<float>(*problem, *tensors);
  });
}

extern "C" int na_dynamic_mix(const na::Problem* problems, const weights::Problem* queries,
                              const na::DynamicTensors* tensors, int64_t count) {
  return status_of([&] {
    for (int64_t i = 0; i < count; i++) {
      problems[i].bfloat16 ? na::mix_dynamic<BFloat16>(problems[i], queries[i], tensors[i])
                           : na::mix_dynamic<float>(problems[i], queries[i], tensors[i]);
    }
  });
}
