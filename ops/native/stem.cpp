// The first layers of a network on the CPU: the plain C interface, see depthwise.cpp. Called from
// ops/inference/packed_stem.py.
#include <new>

#include "stem.h"

extern "C" {

// Returns 0, or 1 where memory ran out. BFloat16 only where linear layers multiply it, see linear.cpp.
int stem_forward(const stem::Problem* problem, const stem::Layer* layers, const void* in,
                 void* out) {
  try {
    stem::forward(*problem, layers, in, out);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
