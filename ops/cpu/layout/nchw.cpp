// NHWC maps to NCHW and back: the C interface, called from nchw.py.
#include "common/interface.h"
#include "layout/nchw.h"

VB_EXPORT_BYTES(nchw, Problem)

extern "C" int nchw_from_nhwc(const nchw::Problem* problem, const void* in, const float* affine,
                              void* out) {
  return status_of([&] {
    const float* const shift = affine + problem->channels;
    if (problem->bfloat16) {
      nchw::from_nhwc(*problem, static_cast<const BFloat16*>(in), affine, shift,
                      static_cast<BFloat16*>(out));
    } else {
      nchw::from_nhwc(*problem, static_cast<const float*>(in), affine, shift,
                      static_cast<float*>(out));
    }
  });
}

extern "C" int nchw_to_nhwc(const nchw::Problem* problem, const void* in, const void* other,
                            void* out) {
  return status_of([&] {
    if (problem->bfloat16) {
      nchw::to_nhwc(*problem, static_cast<const BFloat16*>(in),
                    static_cast<const BFloat16*>(other), static_cast<BFloat16*>(out));
    } else {
      nchw::to_nhwc(*problem, static_cast<const float*>(in), static_cast<const float*>(other),
                    static_cast<float*>(out));
    }
  });
}
