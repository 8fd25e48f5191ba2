// Deformable convolution: the C interface, called from deformable_conv.py.
#include "common/interface.h"
#include "deformable/deformable.h"

VB_EXPORT_BYTES(deformable, Problem)
VB_EXPORT_BYTES(deformable, Tensors)

extern "C" int deformable_forward(const deformable::Problem* problem, const deformable::Tensors* tensors) {
  return status_of([&] { deformable::forward(*problem, *tensors); });
}
