// Means of windows on the CPU: the C interface. Called from window_means.py beside it.
#include "common/interface.h"
#include "pooling/pooling.h"

VB_EXPORT_BYTES(pooling, Problem)

extern "C" int pooling_forward(const pooling::Problem* problem, const void* in, void* out) {
  return status_of([&] { pooling::forward(*problem, in, out); });
}
