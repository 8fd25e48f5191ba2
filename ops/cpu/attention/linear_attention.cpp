// Rank-augmented linear attention of RAVLT. Every map is read once or twice, in pieces that stay in
// the L1 cache. Lanes are channels.
#include "common/kernel.h"
#include "common/rotation.h"

namespace linear_attention {

using simd::F;
using simd::W;

// linear.py fills in these fields.
struct Problem {
  int64_t batch, heads, height, width, dim;      // dim: of a head, a multiple of 2 W
  int64_t stride[3], bias_stride[3], out_stride[3];  // of image, token and head
  double scale, eps;
  int64_t bfloat16, threads;
};

struct Tensors {
  const void *query, *key, *value, *gate;
  const void* bias;  // added to the attention before the gate; null for none
  const float *row_table, *column_table;  // see rotation.h
  void* out;
};

constexpr int CHUNK = 64;  // tokens at a time
constexpr int ROWS = simd::REGISTERS == 32 ? 6 : 3;
constexpr int COLUMNS = simd::REGISTERS == 32 ? 4 : 2;
constexpr float LOG2E = 1.44269504f;

// ELU + 1
static VB_INLINE F feature(F x) {
  const F up = simd::max(simd::zero(), x);
  return up + simd::exp2((x - up) * simd::set1(LOG2E));
}

// ---- small matrix products ---------------------------------------------------------------------
// out[r][c] (+)= sum over i of a[r * a_row + i * a_step] * b[i * pitch + c]; `out` has the pitch
// too.
struct ProductArgs {
  const float* a;
  ptrdiff_t a_row, a_step;
  const float* b;
  float* out;
  ptrdiff_t pitch;
  int count;
  bool fresh;
};

template <int R, int C>
static void product(const ProductArgs& args) {
  const ProductArgs p = args;
  F sum[R][C];
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) {
      sum[r][c] = p.fresh ? simd::zero() : simd::load(p.out + r * p.pitch + c * W);
    }
  }
  for (int i = 0; i < p.count; i++) {
    F b[C];
    VB_UNROLL
    for (int c = 0; c < C; c++) b[c] = simd::in_register(simd::load(p.b + i * p.pitch + c * W));
    VB_UNROLL
    for (int r = 0; r < R; r++) {
      const F a = simd::in_register(simd::set1(p.a[r * p.a_row + i * p.a_step]));
      VB_UNROLL
      for (int c = 0; c < C; c++) sum[r][c] = simd::fma(a, b[c], sum[r][c]);
    }
  }
  VB_UNROLL
  for (int r = 0; r < R; r++) {
    VB_UNROLL
    for (int c = 0; c < C; c++) simd::store(p.out + r * p.pitch + c * W, sum[r][c]);
  }
}

// [rows - 1][vectors - 1]
static constexpr auto PRODUCT = variants<ROWS>([](auto r) {
  return variants<COLUMNS>([](auto c) { return product<decltype(r)::value, c.value>; });
});

// `rows` × `dim` outputs of the above, one register block at a time.
static void multiply(ProductArgs args, int rows, int dim) {
  const float *a = args.a, *b = args.b;
  float* out = args.out;
  for (int r = 0; r < rows; r += ROWS) {
    const int count = std::min(ROWS, rows - r);
    for (int c = 0; c < dim; c += COLUMNS * W) {
      const int vectors = std::min(COLUMNS, (dim - c) / W);
      args.a = a + r * args.a_row;
      args.b = b + c;
      args.out = out + r * args.pitch + c;
      PRODUCT[count - 1][vectors - 1](args);
    }
  }
}

// ---- one head of one image ---------------------------------------------------------------------
// Accumulators of the tokens of a segment.
struct Sums {
  ScratchBuffer<float> buffer;
  float *vector, *state;
  float top, total;
};

struct Scratch {
  ScratchBuffer<float> buffers[3];
  float *features, *weights, *mean;
  std::vector<Sums> sums;  // per segment; finally, the first holds the totals
};

// A thread's buffers for pieces of tokens.
struct Pieces {
  float *left, *right, *out;
};

template <class T>
struct Head {
  const Problem& p;
  const Tensors& t;
  int64_t image, head;
  Scratch& s;
  int dim;
  int64_t tokens;

  const T* at(const void* base, int64_t token, const int64_t (&stride)[3]) const {
    return static_cast<const T*>(base) + image * stride[0] + token * stride[1] + head * stride[2];
  }

  void rotate(const float* in, int64_t token, F factor, float* out) const {
    rotation::rotate({t.row_table, t.column_table, p.width, dim}, in, token, factor, out);
  }

  void add_queries(int64_t first, int64_t end, Sums& sums) const {
    for (int c = 0; c < dim; c += W) {
      F sum = simd::zero();
      for (int64_t begin = first; begin < end; begin += CHUNK) {
        F part = simd::zero();
        for (int64_t n = begin; n < std::min(end, begin + CHUNK); n++) {
          part = part + feature(simd::load_as_float(at(t.query, n, p.stride) + c));
        }
        sum = sum + part;
      }
      simd::store(sums.vector + c, sum);
    }
  }

  // The features of the keys, and their scores against the mean query.
  void compare_keys(int64_t first, int64_t end, Sums& sums) const {
    sums.top = -INFINITY;
    for (int64_t n = first; n < end; n++) {
      const T* key = at(t.key, n, p.stride);
      float* out = s.features + n * dim;
      F sum = simd::zero();
      for (int c = 0; c < dim; c += W) {
        const F x = feature(simd::load_as_float(key + c));
        simd::store(out + c, x);
        sum = simd::fma(x, simd::load(s.mean + c), sum);
      }
      s.weights[n] = simd::reduce_add(sum);
      sums.top = std::max(sums.top, s.weights[n]);
    }
  }

  // Accumulates the state, the sum of rotated weighted keys times values, and the sum of weighted
  // keys.
  void collect(int64_t first, int64_t end, float top, Sums& sums, Pieces& pieces) const {
    std::fill_n(sums.vector, dim, 0.f);
    for (int64_t n = end; n % W; n++) s.weights[n] = -INFINITY;  // past the last segment
    F total = simd::zero();
    for (int64_t n = first; n < end; n += W) {
      const F x = simd::exp2(simd::load(s.weights + n) - simd::set1(top));
      simd::store(s.weights + n, x);
      total = total + x;
    }
    sums.total = simd::reduce_add(total);
    for (int64_t begin = first; begin < end; begin += CHUNK) {
      const int count = static_cast<int>(std::min<int64_t>(CHUNK, end - begin));
      for (int i = 0; i < count; i++) {
        const F weight = simd::set1(s.weights[begin + i]);
        const float* key = s.features + (begin + i) * dim;
        const T* value = at(t.value, begin + i, p.stride);
        for (int c = 0; c < dim; c += W) {
          float* sum = sums.vector + c;
          simd::store(sum, simd::fma(simd::load(key + c), weight, simd::load(sum)));
          simd::store(pieces.right + i * dim + c, simd::load_as_float(value + c));
        }
        rotate(key, begin + i, weight, pieces.left + i * dim);
      }
      multiply({pieces.left, 1, dim, pieces.right, sums.state, dim, count,
                begin == first},
               dim, dim);
    }
  }

  void give(int64_t first, int64_t end, const Sums& sums, Pieces& pieces) const {
    for (int64_t begin = first; begin < end; begin += CHUNK) {
      const int count = static_cast<int>(std::min<int64_t>(CHUNK, end - begin));
      float factor[CHUNK];
      for (int i = 0; i < count; i++) {
        const T* query = at(t.query, begin + i, p.stride);
        float* left = pieces.left + i * dim;
        F sum = simd::zero();
        for (int c = 0; c < dim; c += W) {
          const F x = feature(simd::load_as_float(query + c));
          sum = simd::fma(x, simd::load(sums.vector + c), sum);
          simd::store(left + c, x);
        }
        // Both sums are too large by a factor of `total`.
        factor[i] = 1.f / (simd::reduce_add(sum) + static_cast<float>(p.eps) * sums.total);
        rotate(left, begin + i, simd::set1(1.f), left);
      }
      multiply({pieces.left, dim, 1, sums.state, pieces.out, dim, dim, true},
               count, dim);
      for (int i = 0; i < count; i++) {
        const T* gate = at(t.gate, begin + i, p.stride);
        const T* bias = t.bias ? at(t.bias, begin + i, p.bias_stride) : nullptr;
        T* out = static_cast<T*>(t.out) + image * p.out_stride[0] + (begin + i) * p.out_stride[1] +
                 head * p.out_stride[2];
        for (int c = 0; c < dim; c += W) {
          F x = simd::load(pieces.out + i * dim + c) * simd::set1(factor[i]);
          if (bias) x = x + simd::load_as_float(bias + c);
          simd::store_from_float(out + c, x * simd::load_as_float(gate + c));
        }
      }
    }
  }

  // The whole computation, with segments of tokens split among threads.
  void attend(int64_t threads) const {
    const int64_t chunks = (tokens + CHUNK - 1) / CHUNK, segments = std::min(threads, chunks);
    s.features = s.buffers[0].of(tokens * dim);
    s.weights = s.buffers[1].of(tokens + W);
    s.mean = s.buffers[2].of(dim);
    s.sums.resize(segments);
    for (Sums& sums : s.sums) {
      sums.state = sums.buffer.of((int64_t{dim} + 1) * dim);
      sums.vector = sums.state + dim * dim;
    }
    const auto each_segment = [&](const auto& work) {
      parallel::for_each(segments, threads, [&](int64_t i) {
        static thread_local ScratchBuffer<float> buffers[3];
        const int64_t size = CHUNK * dim;
        Pieces pieces{buffers[0].of(size), buffers[1].of(size), buffers[2].of(size)};
        const int64_t first = i * chunks / segments * CHUNK;
        const int64_t end = std::min(tokens, (i + 1) * chunks / segments * CHUNK);
        work(first, end, s.sums[i], pieces);
      });
    };
    each_segment([&](int64_t first, int64_t end, Sums& sums, Pieces&) {
      add_queries(first, end, sums);
    });
    const double factor = p.scale * LOG2E / static_cast<double>(tokens);
    for (int c = 0; c < dim; c++) {
      double sum = 0;
      for (const Sums& sums : s.sums) sum += sums.vector[c];
      s.mean[c] = static_cast<float>(sum * factor);
    }
    each_segment([&](int64_t first, int64_t end, Sums& sums, Pieces&) {
      compare_keys(first, end, sums);
    });
    float top = -INFINITY;
    for (const Sums& sums : s.sums) top = std::max(top, sums.top);
    each_segment([&](int64_t first, int64_t end, Sums& sums, Pieces& pieces) {
      collect(first, end, top, sums, pieces);
    });
    Sums& all = s.sums[0];
    for (int64_t i = 1; i < segments; i++) {
      const Sums& other = s.sums[i];
      all.total += other.total;
      for (int c = 0; c < (dim + 1) * dim; c++) all.state[c] += other.state[c];  // and vector
    }
    each_segment([&](int64_t first, int64_t end, Sums&, Pieces& pieces) {
      give(first, end, all, pieces);
    });
  }
};

template <class T>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t heads = p.batch * p.heads;
  // With few heads, threads split each head; with many, they split the heads.
  const bool inside = heads < p.threads;
  parallel::for_each(heads, inside ? 1 : p.threads, [&](int64_t index) {
    static thread_local Scratch s;
    const Head<T> head{p,     t, index / p.heads, index % p.heads, s, static_cast<int>(p.dim),
                       p.height * p.width};
    head.attend(inside ? p.threads : 1);
  });
}

}  // namespace linear_attention

// The C interface, called from linear.py.
extern "C" int linear_attention_forward(const linear_attention::Problem* problem,
                                        const linear_attention::Tensors* tensors) {
  return status_of(problem->bfloat16, [&](auto type) {
    linear_attention::forward<decltype(type)>(*problem, *tensors);
  });
}
