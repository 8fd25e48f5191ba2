// The first layers of a network on the CPU: the C interface. Called from packed_stem.py beside it.
#include "common/interface.h"
#include "stem/stem.h"

VB_EXPORT_BYTES(stem, Problem)
VB_EXPORT_BYTES(stem, Layer)

// BFloat16 only where linear layers multiply it, see gemm.cpp.
extern "C" int stem_forward(const stem::Problem* problem, const stem::Layer* layers,
                            const void* in, void* out) {
  return status_of([&] { stem::forward(*problem, layers, in, out); });
}
