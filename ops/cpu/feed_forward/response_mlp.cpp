// A feed-forward with squeeze-and-excitation before it and a response norm between its two layers,
// in one pass: gates from the means of a map, the hidden map with its energies, scales from those,
// and the result with the shortcut. A few images at a time, so that intermediates stay in the
// cache.
//
// Gates and scales are per image and input of a layer. If an image has more pixels than the layer
// has outputs, they are multiplied into the weights rather than the map, unless those are in int8.
#include "common/kernel.h"
#include "gemm/call.h"

namespace response_mlp {

using simd::F;
using simd::W;

// response_mlp.py fills in these fields.
struct Problem {
  int64_t images, pixels;  // pixels per image
  int64_t dim, squeezed, hidden;
  int64_t bfloat16;
  double eps;
  int64_t threads;
};

// Maps are [images][pixels][dim], float or BFloat16 like the packed weights of the two layers
// (gemm/pack.h). All others are float: `squeeze` [dim][squeezed], `excite` [squeezed][dim],
// `response` [hidden] and biases. A layer with a `weight_scale` is one in int8, see problem.h there.
struct Tensors {
  const void* in;
  const float *squeeze, *squeeze_bias, *excite, *excite_bias;
  const void* weight1;
  const float* bias1;
  const float* response;
  const void* weight2;
  const float* bias2;
  const void* other;
  void* out;
  const float *weight_scale1, *in_range1, *weight_scale2, *in_range2;
};

// Bytes of the hidden maps of the images processed at once. In bfloat16, reading weights takes
// longer, so that more rows share them.
constexpr int64_t group_bytes(const float*) { return 512 << 10; }
constexpr int64_t group_bytes(const BFloat16*) { return 2 << 20; }
constexpr int64_t PARTIAL_PIXELS = 256;  // per partial sum
constexpr int MEAN_VECTORS = 4, CHAINS = 4;

// ---- gates -------------------------------------------------------------------------------------
// Sums V vectors of channels over `pixels` pixels; the last vector has `lanes` channels.
template <int V, class T>
static void add_pixels(const T* in, int64_t pixels, int64_t dim, int lanes, float* sums) {
  F sum[V];
  for (int v = 0; v < V; v++) sum[v] = simd::zero();
  for (int64_t i = 0; i < pixels; i++, in += dim) {
    VB_UNROLL
    for (int v = 0; v < V; v++) sum[v] = sum[v] + simd::get(in + v * W, v == V - 1 ? lanes : W);
  }
  for (int v = 0; v < V; v++) simd::store(sums + v * W, simd::load(sums + v * W) + sum[v]);
}

// `sums` holds whole vectors.
template <class T>
static void sum_pixels(const T* in, int64_t pixels, int64_t dim, float* sums) {
  std::fill_n(sums, simd::round_up(dim, W), 0.f);
  for (int64_t i = 0; i < pixels; i += PARTIAL_PIXELS) {
    const int64_t count = std::min(PARTIAL_PIXELS, pixels - i);
    for (int64_t c = 0; c < dim; c += MEAN_VECTORS * W) {
      const int64_t left = std::min<int64_t>(MEAN_VECTORS * W, dim - c), vectors = (left + W - 1) / W;
      const int lanes = static_cast<int>(left - (vectors - 1) * W);
      const T* place = in + i * dim + c;
      with_constant<MEAN_VECTORS>(vectors, [&](auto size) {
        add_pixels<size.value>(place, count, dim, lanes, sums + c);
      });
    }
  }
}

// Computes in [count] times weight [count][outs] plus bias [outs].
static void multiply(const float* in, int64_t count, const float* weight, const float* bias,
                     int64_t outs, float* out) {
  for (int64_t j = 0; j < outs; j += W) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, outs - j));
    F sum[CHAINS];
    for (int c = 0; c < CHAINS; c++) sum[c] = c ? simd::zero() : simd::get(bias + j, lanes);
    int64_t i = 0;
    for (; i + CHAINS <= count; i += CHAINS) {
      VB_UNROLL
      for (int c = 0; c < CHAINS; c++) {
        const F w = simd::get(weight + (i + c) * outs + j, lanes);
        sum[c] = simd::fma(simd::set1(in[i + c]), w, sum[c]);
      }
    }
    for (; i < count; i++) {
      sum[0] = simd::fma(simd::set1(in[i]), simd::get(weight + i * outs + j, lanes), sum[0]);
    }
    simd::put(out + j, (sum[0] + sum[1]) + (sum[2] + sum[3]), lanes);
  }
}

// Computes the gates of one image's channels. `scratch` holds dim floats, in whole vectors, and
// `squeezed` floats.
template <class T>
static void find_gates(const Problem& p, const Tensors& t, const T* in, float* scratch,
                       float* gates) {
  float* const squeezed = scratch + simd::round_up(p.dim, W);
  sum_pixels(in, p.pixels, p.dim, scratch);
  const float share = 1.f / static_cast<float>(p.pixels);
  for (int64_t c = 0; c < p.dim; c++) scratch[c] *= share;
  multiply(scratch, p.dim, t.squeeze, t.squeeze_bias, p.squeezed, squeezed);
  for (int64_t c = 0; c < p.squeezed; c++) squeezed[c] = squeezed[c] < 0.f ? 0.f : squeezed[c];
  multiply(squeezed, p.squeezed, t.excite, t.excite_bias, p.dim, gates);
  for (int64_t c = 0; c < p.dim; c++) gates[c] = 1.f / (1.f + std::exp(-gates[c]));
}

// Turns the energies of one image's hidden channels into the scales of the response norm, in place.
static void find_scales(const Problem& p, const float* response, float* energy) {
  float sum = 0.f;
  for (int64_t c = 0; c < p.hidden; c++) {
    energy[c] = std::sqrt(energy[c]);
    sum += energy[c];
  }
  const float factor = 1.f / (sum / static_cast<float>(p.hidden) + static_cast<float>(p.eps));
  for (int64_t c = 0; c < p.hidden; c++) energy[c] = 1.f + response[c] * (energy[c] * factor);
}

// ---- layers ------------------------------------------------------------------------------------
// Multiplies the inputs of a packed weight by `scale`, see gemm/pack.h.
static void scale_weight(const float* weight, int64_t out_features, int64_t in_features,
                         const float* scale, float* out) {
  for (int64_t n = 0; n < out_features; n += linear::PANEL) {
    const int64_t width = std::min<int64_t>(linear::PANEL, linear::padded(out_features) - n);
    for (int64_t k = 0; k < in_features; k++, weight += width, out += width) {
      const F by = simd::set1(scale[k]);
      for (int64_t j = 0; j < width; j += W) simd::store(out + j, simd::load(weight + j) * by);
    }
  }
}

static void scale_weight(const BFloat16* weight, int64_t out_features, int64_t in_features,
                         const float* scale, BFloat16* out) {
  constexpr int64_t pairs = linear::TILE_ROWS, line = 2 * W;  // one pair of each output of a tile
  for (int64_t n = 0; n < out_features; n += linear::PANEL) {
    const int64_t tiles = std::min<int64_t>(linear::PANEL, linear::padded(out_features) - n) / W;
    for (int64_t k = 0; k < in_features; k += linear::TILE_INPUTS) {
      for (int64_t row = 0; row < tiles * pairs; row++, weight += line, out += line) {
        const int64_t first = k + row % pairs * 2;
        float by[W];
        for (int l = 0; l < W; l++) by[l] = first + l % 2 < in_features ? scale[first + l % 2] : 0.f;
        for (int64_t j = 0; j < line; j += W) {
          simd::store_from_float(out + j, simd::load_as_float(weight + j) * simd::load(by));
        }
      }
    }
  }
}

// One of the two layers for some images. `scale` [images][in_features] multiplies the inputs.
template <class T>
static void run_layer(const Problem& p, linear::Problem layer, linear::Tensors tensors,
                      int64_t images, const float* scale, ScratchBuffer<T>& buffer) {
  const T* const in = static_cast<const T*>(tensors.in);
  const int64_t features = layer.in_features;
  const bool copied = !linear::takes_rows_in_place(in, features, p.pixels);
  layer.image_rows = p.pixels;
  if (copied || tensors.weight_scale || p.pixels <= layer.out_features) {
    layer.rows = images * p.pixels;
    tensors.scale = scale;
    linear::forward(layer, tensors);
    return;
  }
  const T* const weight = static_cast<const T*>(tensors.weight);
  layer.rows = p.pixels;
  T* const scaled = buffer.of(linear::packed_size(in, layer.out_features, features));
  linear::Tensors image = tensors;
  image.weight = scaled;
  for (int64_t i = 0; i < images; i++) {
    const int64_t row = i * p.pixels;
    scale_weight(weight, layer.out_features, features, scale + i * features, scaled);
    image.in = in + row * layer.in_stride;
    image.out = static_cast<T*>(tensors.out) + row * layer.out_stride;
    if (tensors.other) image.other = static_cast<const T*>(tensors.other) + row * layer.other_stride;
    if (tensors.energy) image.energy = tensors.energy + i * layer.out_features;
    linear::forward(layer, image);
  }
}

template <class T>
static void forward_of(const Problem& p, const Tensors& t) {
  static thread_local ScratchBuffer<T> hidden_buffer, scaled;
  static thread_local ScratchBuffer<float> gates_buffer, energy_buffer, scratch_buffer;
  const int64_t image_hidden = p.pixels * p.hidden;
  const int64_t fitting = group_bytes(hidden_buffer.of(0)) / (image_hidden * int64_t{sizeof(T)});
  const int64_t group = std::min(p.images, std::max<int64_t>(1, fitting));
  T* const hidden = hidden_buffer.of(group * image_hidden);
  float* const gates = gates_buffer.of(group * p.dim);
  float* const energy = energy_buffer.of(group * p.hidden);
  float* const scratch = scratch_buffer.of(simd::round_up(p.dim, W) + p.squeezed);

  linear::Problem expand{}, project{};
  expand.in_features = expand.in_stride = project.out_features = project.out_stride = p.dim;
  expand.out_features = expand.out_stride = project.in_features = project.in_stride = p.hidden;
  expand.activation = activation::GELU;
  project.combination = linear::ADD;
  project.other_stride = p.dim;
  expand.bfloat16 = project.bfloat16 = p.bfloat16;
  expand.threads = project.threads = p.threads;

  for (int64_t first = 0; first < p.images; first += group) {
    const int64_t images = std::min(group, p.images - first), offset = first * p.pixels * p.dim;
    const T* const in = static_cast<const T*>(t.in) + offset;
    for (int64_t i = 0; i < images; i++) {
      find_gates(p, t, in + i * p.pixels * p.dim, scratch, gates + i * p.dim);
    }
    const linear::Tensors before{in,     t.weight1, t.bias1,         nullptr,    nullptr, hidden,
                                 energy, nullptr,   t.weight_scale1, t.in_range1, nullptr};
    run_layer(p, expand, before, images, gates, scaled);
    for (int64_t i = 0; i < images; i++) find_scales(p, t.response, energy + i * p.hidden);
    const linear::Tensors after{hidden,
                                t.weight2,
                                t.bias2,
                                static_cast<const T*>(t.other) + offset,
                                nullptr,
                                static_cast<T*>(t.out) + offset,
                                nullptr,
                                nullptr,
                                t.weight_scale2,
                                t.in_range2,
                                nullptr};
    run_layer(p, project, after, images, energy, scaled);
  }
}

// Threads split the images if those divide about evenly, else each layer.
template <class T>
static void share_out(const Problem& p, const Tensors& t) {
  const bool evenly = p.images % p.threads == 0 || p.images >= 4 * p.threads;
  if (p.threads == 1 || !evenly) return forward_of<T>(p, t);
  const auto work = [&](int64_t index) {
    const linear::Range own = linear::share(p.images, index, p.threads);
    const int64_t offset = own.begin * p.pixels * p.dim;
    Problem part = p;
    part.images = own.end - own.begin;
    part.threads = 1;
    Tensors tensors = t;
    tensors.in = static_cast<const T*>(t.in) + offset;
    tensors.other = static_cast<const T*>(t.other) + offset;
    tensors.out = static_cast<T*>(t.out) + offset;
    forward_of<T>(part, tensors);
  };
  parallel::for_each(p.threads, p.threads, work);
}

}  // namespace response_mlp

// The C interface, called from response_mlp.py.
extern "C" int response_mlp_forward(const response_mlp::Problem* problem,
                                    const response_mlp::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    response_mlp::share_out<decltype(type)>(*problem, *tensors);
  });
}
