// Softmax attention of groups of tokens: the C interface, called from grouped.py and gated.py.
#include "common/interface.h"
#include "attention/attention.h"

VB_EXPORT_BYTES(attention, Problem)
VB_EXPORT_BYTES(attention, Tensors)

extern "C" int attention_forward(const attention::Problem* problem,
                                 const attention::Tensors* tensors) {
  return status_of([&] {
    using namespace attention;
    if (!problem->bfloat16) {
      forward<float, Floats>(*problem, *tensors);
    } else if (tensors->row_table) {  // rotated values would have to be rounded
      forward<BFloat16, Floats>(*problem, *tensors);
    } else {
      forward<BFloat16, simd::Products<BFloat16>>(*problem, *tensors);
    }
  });
}
