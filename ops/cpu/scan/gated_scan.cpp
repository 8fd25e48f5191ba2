// Gated linear attention on the CPU: the C interface. Called from gated_scan.py beside it.
#include "common/interface.h"
#include "scan/forward.h"

VB_EXPORT_BYTES(scan, Problem)
VB_EXPORT_BYTES(scan, ForwardTensors)

extern "C" int gated_scan_forward(const scan::Problem* problem,
                                  const scan::ForwardTensors* tensors) {
  return status_of([&] {
    if (problem->bfloat16) {
      scan::forward<BFloat16>(*problem, *tensors);
    } else {
      scan::forward<float>(*problem, *tensors);
    }
  });
}
