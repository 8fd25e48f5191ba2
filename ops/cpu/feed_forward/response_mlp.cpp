// Feed-forwards with a response norm: the C interface, called from response_mlp.py.
#include "common/interface.h"
#include "feed_forward/response_mlp.h"

VB_EXPORT_BYTES(response_mlp, Problem)
VB_EXPORT_BYTES(response_mlp, Tensors)

extern "C" int response_mlp_forward(const response_mlp::Problem* problem,
                                    const response_mlp::Tensors* tensors) {
  return status_of([&] { response_mlp::forward(*problem, *tensors); });
}
