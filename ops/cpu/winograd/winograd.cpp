// Convolutions of 3×3 with stride 1 by Winograd's minimal filtering, F(2×2, 3×3): windows of 4×4
// pixels are transformed, multiplied with transformed weights in 16 products of matrices, and
// transformed back to 2×2 outputs, with 4/9 of the multiplications (Lavin and Gray 2015). Some
// windows and groups of channels at a time, so that what lies between stays in the L2 cache.
#include "common/kernel.h"
#include "common/activation.h"
#include "gemm/call.h"

namespace winograd {

using simd::F;
using simd::W;

// winograd.py fills in these fields.
struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t padding[2], groups;
  int64_t activation, threads;
};

// Maps are [batch][height][width][channels]; `weight` is [groups][POINTS][packed_size], each packed
// by pack.h, of the transformed weight [outputs of a group][inputs of a group].
struct Tensors {
  const float *in, *weight, *bias;
  float* out;
};

constexpr int SIDE = 4, STEP = 2, POINTS = SIDE * SIDE;
// Of transformed inputs and outputs per block, and the fewest windows for which weights are read.
constexpr int64_t BLOCK_FLOATS = 128 * 1024, FEWEST = 48;
// Of the groups that are computed together.
constexpr int64_t GROUP_CHANNELS = 48;
// Weights of the next product that are fetched before each product.
constexpr int64_t FETCHED = 1024;

// Bᵀ x for a row or column of a window.
static VB_INLINE void transform_in(F (&x)[SIDE]) {
  const F first = x[0] - x[2], second = x[1] + x[2], third = x[2] - x[1], fourth = x[1] - x[3];
  x[0] = first, x[1] = second, x[2] = third, x[3] = fourth;
}

// Pixels between rows of a block: an odd number of cache lines, so that they do not map to the same
// sets of the L1 cache.
static int64_t pitch_of(int64_t channels) {
  constexpr int64_t line = linear::LINE / int64_t{sizeof(float)};
  return ((channels + line - 1) / line | 1) * line;
}

// A block of windows, counted over the rows of all images, of some groups.
struct Task {
  const Problem& p;
  const Tensors& t;
  Range windows, groups;
  float *in, *out;  // [POINTS][windows][pitch]

  int64_t inputs() const { return p.channels / p.groups; }
  int64_t outputs() const { return p.out_channels / p.groups; }
  int64_t columns() const { return (p.out_width + STEP - 1) / STEP; }
  int64_t rows() const { return (p.out_height + STEP - 1) / STEP; }

  // Calls work(image, first output row, first output column, index in the block).
  template <class Work>
  void each(const Work& work) const {
    for (int64_t i = windows.begin; i < windows.end; i++) {
      const int64_t line = i / columns();
      work(line / rows(), line % rows() * STEP, i % columns() * STEP, i - windows.begin);
    }
  }

  void read() const {
    const int64_t channels = length(groups) * inputs();
    const int64_t pitch = pitch_of(channels), plane = length(windows) * pitch;
    each([&](int64_t image, int64_t y, int64_t x, int64_t index) {
      const int64_t top = y - p.padding[0], left = x - p.padding[1];
      const float* const map =
          t.in + image * p.height * p.width * p.channels + groups.begin * inputs();
      const float* pixel[SIDE][SIDE];  // null outside the map
      for (int64_t r = 0; r < SIDE; r++) {
        for (int64_t c = 0; c < SIDE; c++) {
          const bool inside = top + r >= 0 && top + r < p.height && left + c >= 0 &&
                              left + c < p.width;
          pixel[r][c] =
              inside ? map + ((top + r) * p.width + left + c) * p.channels : nullptr;
        }
      }
      float* const to = in + index * pitch;
      for (int64_t channel = 0; channel < channels; channel += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, channels - channel));
        F row[SIDE][SIDE];
        VB_UNROLL
        for (int r = 0; r < SIDE; r++) {
          VB_UNROLL
          for (int c = 0; c < SIDE; c++) {
            row[r][c] = pixel[r][c] ? simd::get(pixel[r][c] + channel, lanes) : simd::zero();
          }
          transform_in(row[r]);
        }
        VB_UNROLL
        for (int c = 0; c < SIDE; c++) {
          F column[SIDE] = {row[0][c], row[1][c], row[2][c], row[3][c]};
          transform_in(column);
          VB_UNROLL
          for (int r = 0; r < SIDE; r++) {
            simd::store(to + (r * SIDE + c) * plane + channel, column[r]);
          }
        }
      }
    });
  }

  void multiply() const {
    const int64_t count = length(windows), size = linear::padded(outputs()) * inputs();
    linear::Problem layer = linear::layer_of<float>(count, inputs(), outputs());
    layer.in_stride = pitch_of(length(groups) * inputs());
    layer.out_stride = pitch_of(length(groups) * outputs());
    static thread_local ScratchBuffer<float> buffer;
    float* const zeros = buffer.of(outputs());
    std::fill_n(zeros, outputs(), 0.f);
    for (int64_t group = groups.begin; group < groups.end; group++) {
      for (int64_t point = 0; point < POINTS; point++) {
        linear::Tensors tensors{};
        const int64_t index = group - groups.begin;
        tensors.in = in + point * count * layer.in_stride + index * inputs();
        tensors.weight = t.weight + (group * POINTS + point) * size;
        tensors.bias = zeros;
        tensors.out = out + point * count * layer.out_stride + index * outputs();
        // Products fetch the rest of their weights themselves.
        memory::fetch<memory::READ>(t.weight + (group * POINTS + point + 1) * size,
                                    std::min(size, FETCHED));
        linear::forward(layer, tensors);
      }
    }
  }

  void write() const {
    const int64_t channels = length(groups) * outputs(), skipped = groups.begin * outputs();
    const int64_t pitch = pitch_of(channels), plane = length(windows) * pitch;
    each([&](int64_t image, int64_t y, int64_t x, int64_t index) {
      const int64_t pixel = (image * p.out_height + y) * p.out_width + x;
      const int64_t down = std::min<int64_t>(STEP, p.out_height - y);
      const int64_t across = std::min<int64_t>(STEP, p.out_width - x);
      const float* const from = out + index * pitch;
      for (int64_t channel = 0; channel < channels; channel += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, channels - channel));
        const F bias = simd::get(t.bias + skipped + channel, lanes);
        F row[STEP][SIDE], sum[STEP * STEP];
        VB_UNROLL
        for (int c = 0; c < SIDE; c++) {
          F m[SIDE];
          VB_UNROLL
          for (int r = 0; r < SIDE; r++) {
            m[r] = simd::load(from + (r * SIDE + c) * plane + channel);
          }
          row[0][c] = m[0] + m[1] + m[2];
          row[1][c] = m[1] - m[2] - m[3];
        }
        VB_UNROLL
        for (int r = 0; r < STEP; r++) {
          sum[r * STEP] = row[r][0] + row[r][1] + row[r][2] + bias;
          sum[r * STEP + 1] = row[r][1] - row[r][2] - row[r][3] + bias;
        }
        if (activation::is_clip(p.activation)) {
          const F limit = activation::clip_limit(p.activation);
          for (F& s : sum) s = activation::clip(s, limit);
        } else if (p.activation != activation::NONE) {
          activation::apply<float>(sum, STEP * STEP, p.activation);
        }
        for (int64_t r = 0; r < down; r++) {
          for (int64_t c = 0; c < across; c++) {
            float* const place = t.out + (pixel + r * p.out_width + c) * p.out_channels;
            simd::put(place + skipped + channel, sum[r * STEP + c], lanes);
          }
        }
      }
    });
  }
};

static void forward(const Problem& p, const Tensors& t) {
  const int64_t of_image = ((p.out_height + 1) / STEP) * ((p.out_width + 1) / STEP);
  const int64_t all = p.batch * of_image;
  const int64_t inputs = p.channels / p.groups, outputs = p.out_channels / p.groups;
  const int64_t together = std::clamp<int64_t>(GROUP_CHANNELS / inputs, 1, p.groups);
  const int64_t parts = (p.groups + together - 1) / together;
  const int64_t in_pitch = pitch_of(together * inputs), out_pitch = pitch_of(together * outputs);
  const int64_t fitting = std::max(FEWEST, BLOCK_FLOATS / (POINTS * std::max(in_pitch, out_pitch)));
  const int64_t wanted = std::max((all + fitting - 1) / fitting, p.threads);
  const int64_t blocks = std::min(all, wanted), most = (all + blocks - 1) / blocks;
  parallel::for_each(blocks * parts, p.threads, [&](int64_t index) {
    static thread_local ScratchBuffer<float> in, out;
    // Whole vectors are stored.
    const Task task{p, t, share(all, index / parts, blocks),
                    share(p.groups, index % parts, parts), in.of(POINTS * most * in_pitch),
                    out.of(POINTS * most * out_pitch)};
    task.read();
    task.multiply();
    task.write();
  });
}

}  // namespace winograd

// The C interface, called from winograd.py.
extern "C" int winograd_forward(const winograd::Problem* problem,
                                const winograd::Tensors* tensors) {
  return status_of([&] { winograd::forward(*problem, *tensors); });
}
