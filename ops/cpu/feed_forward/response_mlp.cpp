// Feed-forwards with a response norm inside on the CPU: the C interface. Called from response_mlp.py beside it.
#include "common/interface.h"
#include "feed_forward/response_mlp.h"

VB_EXPORT_BYTES(response_mlp, Problem)
VB_EXPORT_BYTES(response_mlp, Tensors)

extern "C" int response_mlp_forward(const response_mlp::Problem* problem,
                                    const response_mlp::Tensors* tensors) {
  return status_of([&] { response_mlp::forward(*problem, *tensors); });
}
