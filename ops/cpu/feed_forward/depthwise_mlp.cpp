// Feed-forwards with a depthwise convolution: the C interface, called from depthwise_mlp.py.
#include "common/interface.h"
#include "feed_forward/depthwise_mlp.h"

VB_EXPORT_BYTES(depthwise_mlp, Problem)
VB_EXPORT_BYTES(depthwise_mlp, Tensors)

extern "C" int depthwise_mlp_forward(const depthwise_mlp::Problem* problem,
                                     const depthwise_mlp::Tensors* tensors) {
  return status_of([&] { depthwise_mlp::forward(*problem, *tensors); });
}
