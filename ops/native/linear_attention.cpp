// Rank-augmented linear attention on the CPU: the plain C interface, without any header of torch,
// so that it compiles in seconds and one library serves every version of torch. Called through
// ctypes from ops/inference/linear_attention.py.
#include <new>

#include "linear_attention.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int linear_attention_forward(const linear_attention::Problem* problem,
                             const linear_attention::Tensors* tensors) {
  try {
    if (problem->bfloat16) {
      linear_attention::forward<BFloat16>(*problem, *tensors);
    } else {
      linear_attention::forward<float>(*problem, *tensors);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
