// Gated linear attention: the C interface, called from gated_scan.py.
#include "common/interface.h"
#include "scan/backward.h"
#include "scan/forward.h"
#include "scan/mixed.h"
#include "scan/normed.h"

VB_EXPORT_BYTES(gated_scan, Problem)
VB_EXPORT_BYTES(gated_scan, BackwardTensors)
VB_EXPORT_BYTES(gated_scan, ForwardTensors)
VB_EXPORT_BYTES(gated_scan, MixedTensors)
VB_EXPORT_BYTES(gated_scan, Mixture)
VB_EXPORT_BYTES(gated_scan, NormedTensors)

extern "C" int gated_scan_forward(const gated_scan::Problem* problem,
                                  const gated_scan::ForwardTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? gated_scan::forward<BFloat16>(*problem, *tensors)
                      : gated_scan::forward<float>(*problem, *tensors);
  });
}

extern "C" int gated_scan_mixed(const gated_scan::Problem* problem,
                                const gated_scan::MixedTensors* tensors,
                                const gated_scan::Mixture* mixture) {
  return status_of([&] {
    problem->bfloat16 ? gated_scan::forward<BFloat16>(*problem, *tensors, *mixture)
                      : gated_scan::forward<float>(*problem, *tensors, *mixture);
  });
}

extern "C" int gated_scan_normed(const gated_scan::Problem* problem,
                                 const gated_scan::NormedTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? gated_scan::forward<BFloat16>(*problem, *tensors)
                      : gated_scan::forward<float>(*problem, *tensors);
  });
}

extern "C" int gated_scan_backward(const gated_scan::Problem* problem,
                                   const gated_scan::BackwardTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? gated_scan::differentiate<BFloat16>(*problem, *tensors)
                      : gated_scan::differentiate<float>(*problem, *tensors);
  });
}
