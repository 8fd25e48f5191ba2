// Means of windows: the C interface, called from window_means.py.
#include "common/interface.h"
#include "pooling/pooling.h"

VB_EXPORT_BYTES(pooling, Problem)

extern "C" int pooling_forward(const pooling::Problem* problem, const void* in, void* out) {
  return status_of([&] { pooling::forward(*problem, in, out); });
}
