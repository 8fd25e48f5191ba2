// Depthwise convolution: the C interface, called from conv.py.
#include "common/interface.h"
#include "depthwise/branches.h"
#include "depthwise/pairs.h"

VB_EXPORT_BYTES(depthwise, Problem)
VB_EXPORT_BYTES(depthwise, Tensors)

extern "C" int depthwise_forward(const depthwise::Problem* problem, const depthwise::Tensors* tensors) {
  return status_of([&] {
#if VB_PAIRS
    if (problem->bfloat16 && depthwise::takes_pairs(*problem)) {
      return depthwise::forward_pairs(*problem, *tensors);
    }
#endif
    problem->bfloat16 ? depthwise::forward_any<BFloat16>(*problem, *tensors)
                      : depthwise::forward_any<float>(*problem, *tensors);
  });
}

extern "C" int depthwise_branches(const depthwise::Problem* problems,
                                  const depthwise::Tensors* tensors, int64_t count,
                                  int64_t passed) {
  return status_of([&] {
    problems->bfloat16 ? depthwise::branches<BFloat16>(problems, tensors, count, passed)
                       : depthwise::branches<float>(problems, tensors, count, passed);
  });
}
