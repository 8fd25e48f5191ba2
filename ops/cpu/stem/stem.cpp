// The first layers of a network: the C interface, called from packed_stem.py.
#include "common/interface.h"
#include "stem/stem.h"

VB_EXPORT_BYTES(stem, Problem)
VB_EXPORT_BYTES(stem, Layer)

// BFloat16 only if linear layers have products of it, see gemm.cpp.
extern "C" int stem_forward(const stem::Problem* problem, const stem::Layer* chain,
                            const void* in, void* out) {
  return status_of([&] { stem::forward(*problem, chain, in, out); });
}
