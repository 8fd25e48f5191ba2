// Neighborhood attention: the C interface, called from attention.py.
#include "common/interface.h"
#include "neighborhood/backward.h"
#include "neighborhood/dynamic.h"
#include "neighborhood/forward.h"
#include "neighborhood/split.h"

extern "C" int na_forward(const na::Problem* problem, const na::ForwardTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    na::forward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int na_backward(const na::Problem* problem, const na::BackwardTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    na::backward<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int na_scores(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    na::scores<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int na_mix(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    na::mix<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int na_scatter(const na::Problem* problem, const na::SplitTensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    na::scatter<decltype(type)>(*problem, *tensors);
  });
}

extern "C" int na_dynamic_mix(const na::Problem* problems, const weights::Problem* queries,
                              const na::DynamicTensors* tensors, int64_t count) {
  return status_of(problems->bfloat16, [&](auto type) {
    for (int64_t i = 0; i < count; i++) {
      with_type(queries[i].half_bias, [&](auto bias) {
        na::mix_dynamic<decltype(type), decltype(bias)>(problems[i], queries[i], tensors[i]);
      });
    }
  });
}
