// Deformable convolution of channels-last maps: for some output pixels at a time, the inputs of
// their taps are interpolated into rows, to which a linear layer is applied while they are in the
// cache.
// https://arxiv.org/abs/1703.06211
#include "common/kernel.h"
#include "gemm/call.h"

namespace deformable {

using simd::F;
using simd::W;

// deformable_conv.py fills in these fields.
struct Problem {
  int64_t batch, height, width, channels;          // of the input
  int64_t out_height, out_width, out_features;
  int64_t kernel, stride;                          // the same for rows and columns; no padding
  int64_t in_stride[3];                            // for image, row and pixel, in elements
  int64_t activation, bfloat16, threads;
};

// `offset` is [batch][out_height][out_width][tap][row, column], `weight` the packed weight of a
// linear layer from [tap][channel] to out_features, `out`
// [batch][out_height][out_width][out_features].
struct Tensors {
  const void* in;
  const float* offset;
  const void* weight;
  const float* bias;
  void* out;
};

constexpr int64_t ROW_BYTES = 384 * 1024;  // interpolated at a time
constexpr int64_t FEWEST_PIXELS = 56;      // that justify reading the weights again

// Interpolates the map at (y, x); it is zero beyond the border.
template <class T>
static void interpolate(const Problem& p, const T* in, float y, float x, T* out) {
  const float top = std::floor(y), left = std::floor(x);
  const float down = y - top, right = x - left;
  // NaN fails these comparisons, before any conversion to integer.
  const bool seen = y > -1.f && x > -1.f && y < static_cast<float>(p.height) &&
                    x < static_cast<float>(p.width);
  if (!seen) {
    std::fill_n(out, p.channels, T{});
    return;
  }
  const int64_t row = static_cast<int64_t>(top), column = static_cast<int64_t>(left);
  const T* corner[4];
  float share[4];
  int count = 0;
  for (int i = 0; i < 4; i++) {
    const int64_t r = row + i / 2, c = column + i % 2;
    if (r < 0 || c < 0 || r >= p.height || c >= p.width) continue;
    corner[count] = in + r * p.in_stride[1] + c * p.in_stride[2];
    share[count++] = (i / 2 ? down : 1.f - down) * (i % 2 ? right : 1.f - right);
  }
  for (int64_t c = 0; c < p.channels; c += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - c));
    F sum = simd::zero();
    for (int i = 0; i < count; i++) {
      sum = simd::fma(simd::set1(share[i]), simd::get(corner[i] + c, lanes), sum);
    }
    simd::put(out + c, sum, lanes);
  }
}

// A NaN offset comes from NaN pixels. They are sampled with an offset of zero, so the result is
// NaN.
static VB_INLINE float zero_if_nan(float offset) { return offset == offset ? offset : 0.f; }

template <class T>
static void convolve(const Problem& p, const Tensors& t, int64_t first, int64_t end,
                     std::vector<T>& rows) {
  const int64_t taps = p.kernel * p.kernel, features = taps * p.channels;
  rows.resize(static_cast<size_t>((end - first) * features));
  T* row = rows.data();
  for (int64_t i = first; i < end; i++) {
    const int64_t image = i / (p.out_height * p.out_width);
    const int64_t y = i / p.out_width % p.out_height, x = i % p.out_width;
    const T* in = static_cast<const T*>(t.in) + image * p.in_stride[0];
    const float* offset = t.offset + i * taps * 2;
    for (int64_t tap = 0; tap < taps; tap++, offset += 2, row += p.channels) {
      const int64_t from_y = y * p.stride + tap / p.kernel, from_x = x * p.stride + tap % p.kernel;
      interpolate(p, in, static_cast<float>(from_y) + zero_if_nan(offset[0]),
                  static_cast<float>(from_x) + zero_if_nan(offset[1]), row);
    }
  }
  linear::map_rows(rows.data(), end - first, features, t.weight, t.bias, p.out_features,
                   p.activation, static_cast<T*>(t.out) + first * p.out_features);
}

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t features = p.kernel * p.kernel * p.channels;
  const int64_t fitting = std::max(FEWEST_PIXELS, ROW_BYTES / (features * int64_t{sizeof(T)}));
  const int64_t tasks = std::max((pixels + fitting - 1) / fitting, std::min(pixels, p.threads));
  const auto work = [&](int64_t i) {
    static thread_local std::vector<T> rows;
    convolve<T>(p, t, pixels * i / tasks, pixels * (i + 1) / tasks, rows);
  };
  parallel::for_each(tasks, p.threads, work);
}

}  // namespace deformable

// The C interface, called from deformable_conv.py.
extern "C" int deformable_forward(const deformable::Problem* problem, const deformable::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    deformable::forward<decltype(type)>(*problem, *tensors);
  });
}
