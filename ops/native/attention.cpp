// Attention of groups of tokens on the CPU: the plain C interface, without any header of torch, so
// that it compiles in seconds and one library serves every version of torch. Called through ctypes
// from ops/inference/grouped_attention.py.
#include <new>

#include "attention.h"

extern "C" {

// Returns 0, or 1 where memory ran out.
int attention_forward(const attention::Problem* problem, const attention::Tensors* tensors) {
  try {
    using namespace attention;
    if (!problem->bfloat16) {
      forward<float, Floats>(*problem, *tensors);
    } else if (tensors->row_table) {  // rotated ones would have to be rounded
      forward<BFloat16, Floats>(*problem, *tensors);
    } else {
      forward<BFloat16, simd::Products<BFloat16>>(*problem, *tensors);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
