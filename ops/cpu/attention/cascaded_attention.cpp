// Cascaded attention within small maps: the C interface, called from cascaded.py.
#include "common/interface.h"
#include "attention/cascaded_attention.h"

VB_EXPORT_BYTES(cascaded_attention, Problem)
VB_EXPORT_BYTES(cascaded_attention, Tensors)

extern "C" int cascaded_attention_forward(const cascaded_attention::Problem* problem,
                                          const cascaded_attention::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? cascaded_attention::forward<BFloat16>(*problem, *tensors)
                      : cascaded_attention::forward<float>(*problem, *tensors);
  });
}
