// Attention within small maps on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/cascaded_attention.py.
#include <new>

#include "cascaded_attention.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int cascaded_attention_forward(const cascaded_attention::Problem* problem,
                               const cascaded_attention::Tensors* tensors) {
  try {
    if (problem->bfloat16) {
      cascaded_attention::forward<BFloat16>(*problem, *tensors);
    } else {
      cascaded_attention::forward<float>(*problem, *tensors);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
