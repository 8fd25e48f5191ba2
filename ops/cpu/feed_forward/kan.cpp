// Kolmogorov-Arnold layers: the C interface, called from kan.py.
#include "common/interface.h"
#include "feed_forward/kan.h"

VB_EXPORT_BYTES(kan, Problem)
VB_EXPORT_BYTES(kan, Tensors)

extern "C" int kan_forward(const kan::Problem* problem, const kan::Tensors* tensors) {
  return status_of([&] { kan::forward(*problem, *tensors); });
}
