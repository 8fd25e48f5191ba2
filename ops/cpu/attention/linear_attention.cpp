// Rank-augmented linear attention: the C interface, called from linear.py.
#include "common/interface.h"
#include "attention/linear_attention.h"

VB_EXPORT_BYTES(linear_attention, Problem)
VB_EXPORT_BYTES(linear_attention, Tensors)

extern "C" int linear_attention_forward(const linear_attention::Problem* problem,
                                        const linear_attention::Tensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? linear_attention::forward<BFloat16>(*problem, *tensors)
                      : linear_attention::forward<float>(*problem, *tensors);
  });
}
