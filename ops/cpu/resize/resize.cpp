// Resizing of 8-bit images: the C interface, called from resize.py.
#include "resize/resize.h"
#include "common/interface.h"

VB_EXPORT_BYTES(resize, Problem)
VB_EXPORT_BYTES(resize, Tensors)

extern "C" int resize_forward(const resize::Problem* problem, const resize::Tensors* t) {
  return status_of([&] {
    const resize::Axis x{t->first_x, t->weights_x, problem->row_taps};
    const resize::Axis y{t->first_y, t->weights_y, problem->column_taps};
    resize::run(*problem, t->in, x, y, t->out);
  });
}

// in [count][channels][pixels] of 8 bits → table[channel][value].
extern "C" int resize_look_up(int64_t count, int64_t channels, int64_t pixels, const uint8_t* in,
                              const float* tables, float* out) {
  for (int64_t plane = 0; plane < count * channels; plane++) {
    const float* const table = tables + plane % channels * 256;
    for (int64_t i = 0; i < pixels; i++) out[i] = table[in[i]];
    in += pixels, out += pixels;
  }
  return 0;
}
