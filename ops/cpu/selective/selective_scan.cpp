// Selective scan: the C interface, called from selective_scan.py.
#include "common/interface.h"
#include "selective/backward.h"
#include "selective/forward.h"

extern "C" int selective_scan_sequences(const selective::Problem* problem,
                                        const selective::Channels* channels,
                                        const selective::SequenceTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? selective::forward<BFloat16>(*problem, *channels, *tensors)
                      : selective::forward<float>(*problem, *channels, *tensors);
  });
}

extern "C" int selective_scan_map(const selective::Problem* problem,
                                  const selective::Channels* channels,
                                  const selective::MapTensors* tensors) {
  return status_of([&] {
    problem->bfloat16 ? selective::forward<BFloat16>(*problem, *channels, *tensors)
                      : selective::forward<float>(*problem, *channels, *tensors);
  });
}

extern "C" int selective_scan_sequences_backward(const selective::Problem* problem,
                                             const selective::Channels* channels,
                                             const selective::ChannelGrads* channel_grads,
                                             const selective::SequenceTensors* tensors,
                                             const selective::SequenceGrads* grads) {
  return status_of([&] {
    problem->bfloat16
        ? selective::differentiate<BFloat16>(*problem, *channels, *channel_grads, *tensors, *grads)
        : selective::differentiate<float>(*problem, *channels, *channel_grads, *tensors, *grads);
  });
}

extern "C" int selective_scan_map_backward(const selective::Problem* problem,
                                             const selective::Channels* channels,
                                             const selective::ChannelGrads* channel_grads,
                                             const selective::MapTensors* tensors,
                                             const selective::MapGrads* grads) {
  return status_of([&] {
    problem->bfloat16
        ? selective::differentiate<BFloat16>(*problem, *channels, *channel_grads, *tensors, *grads)
        : selective::differentiate<float>(*problem, *channels, *channel_grads, *tensors, *grads);
  });
}
