// Maps to planes and back on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/planes.py.
#include <new>

#include "planes.h"

extern "C" {

// Both return 0, or 1 where memory ran out.
int planes_split(const planes::Problem* problem, const void* in, const float* affine, void* out) {
  try {
    const float* const shift = affine + problem->channels;
    if (problem->bfloat16) {
      planes::split(*problem, static_cast<const BFloat16*>(in), affine, shift,
                    static_cast<BFloat16*>(out));
    } else {
      planes::split(*problem, static_cast<const float*>(in), affine, shift,
                    static_cast<float*>(out));
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

int planes_join(const planes::Problem* problem, const void* in, const void* other, void* out) {
  try {
    if (problem->bfloat16) {
      planes::join(*problem, static_cast<const BFloat16*>(in),
                   static_cast<const BFloat16*>(other), static_cast<BFloat16*>(out));
    } else {
      planes::join(*problem, static_cast<const float*>(in), static_cast<const float*>(other),
                   static_cast<float*>(out));
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
