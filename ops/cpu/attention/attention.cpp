// Softmax attention between groups of tokens, such as windows or routed regions. Tables of row
// indices select the tokens in place, so maps are never copied. The softmax is computed online
// ("FlashAttention", Dao et al. 2022).
#include "common/kernel.h"
#include "attention/group.h"
#include "attention/products.h"

namespace attention {

// ---- few queries -------------------------------------------------------------------------------
// Softmax attention of a few queries. Lanes are keys, then channels, since most lanes of queries
// would be empty. Keys and values are read in place if possible.
constexpr int MAX_QUERIES = W * 3 / 4;  // queries at most
constexpr int64_t MAX_KEYS = 1024;  // at most, so that their columns stay in the cache
constexpr int LANES = 2 * W;  // with sums in registers

// Rows of Q queries, in steps of Floats or Pairs, times columns.
struct QueriesArgs {
  const float* rows;  // [Q][row_pitch]
  ptrdiff_t row_pitch;
  const float* const* columns;  // [step], each readable up to a multiple of LANES
  int steps, lanes;
  float* sums;  // [Q][sum_pitch], a multiple of LANES
  ptrdiff_t sum_pitch;
};

template <class P, int Q>
static void multiply_queries(const QueriesArgs& args) {
  const QueriesArgs a = args;
  for (int lane = 0; lane < a.lanes; lane += LANES) {
    F sum[Q][2] = {};
    for (int i = 0; i < a.steps; i++) {
      const F first = simd::in_register(simd::load(a.columns[i] + lane));
      const F second = simd::in_register(simd::load(a.columns[i] + lane + W));
      VB_UNROLL
      for (int q = 0; q < Q; q++) {
        const F x = simd::in_register(simd::set1(a.rows[q * a.row_pitch + i]));
        P::add_product(sum[q][0], x, first);
        P::add_product(sum[q][1], x, second);
      }
    }
    VB_UNROLL
    for (int q = 0; q < Q; q++) {
      simd::store(a.sums + q * a.sum_pitch + lane, sum[q][0]);
      simd::store(a.sums + q * a.sum_pitch + lane + W, sum[q][1]);
    }
  }
}

using MultiplyQueries = void (*)(const QueriesArgs&);
// [queries - 1]
template <class P>
static constexpr auto MULTIPLY_QUERIES =
    variants<MAX_QUERIES>([](auto q) { return multiply_queries<P, q.value>; });

static bool are_few(const Problem& p, const Tensors& t) {
  const int64_t keys = p.region_keys * p.routes;
  return p.queries <= MAX_QUERIES && keys >= W && keys <= MAX_KEYS && !t.terms;
}

// A group with few queries.
template <class T, class P>
struct FewQueries : Group<T, P> {
  using Group<T, P>::p;
  using Group<T, P>::t;
  using Group<T, P>::s;
  using Group<T, P>::keys;
  using Group<T, P>::row;
  using Group<T, P>::query_row;

  void run() const {
    const int count = static_cast<int>(p.queries), dim = static_cast<int>(p.dim);
    const int value_dim = static_cast<int>(p.value_dim), steps = simd::steps<P>(dim);
    const ptrdiff_t row_pitch = round_up(dim, W), key_pitch = round_up(keys(), LANES);
    const ptrdiff_t sum_pitch = round_up(value_dim, LANES);
    find_keys(steps);
    keys_to_columns(steps, key_pitch);
    for (int q = 0; q < count; q++) take_row(q, s.query + q * row_pitch);
    const MultiplyQueries multiply = MULTIPLY_QUERIES<P>[count - 1];
    multiply({s.query, row_pitch, s.key, steps, keys(), s.scores, key_pitch});
    float factor[MAX_QUERIES];
    for (int q = 0; q < count; q++) factor[q] = 1.f / weigh_row(s.scores + q * key_pitch);
    const int key_steps = simd::steps<P>(keys());
    multiply({s.scores, key_pitch, s.value, key_steps, value_dim, s.sums, sum_pitch});
    for (int q = 0; q < count; q++) {
      float* sums = s.sums + q * sum_pitch;
      for (int c = 0; c < value_dim; c += W) {
        simd::store(sums + c, simd::load(sums + c) * simd::set1(factor[q]));
      }
      this->give_row(query_row(q), sums);
    }
  }

  void find_keys(int steps) const {
    // Steps fill whole vectors and are read in place; rotated rows are copies.
    const bool steps_lie = sizeof(T) * P::COUNT == sizeof(float) && p.dim % (W * P::COUNT) == 0;
    const bool keys_lie = steps_lie && !t.row_table;
    const bool values_lie = std::is_same_v<T, float> && p.value_dim % LANES == 0;
    this->each_key([&](int64_t token, int key) {
      if (keys_lie && token >= 0) {
        s.key[key] = reinterpret_cast<const float*>(row(t.key, p.key_stride, token));
      } else {
        this->take_key(token, key);
        s.key[key] = s.keys + static_cast<ptrdiff_t>(key) * steps;
      }
      const T* value = token < 0 ? nullptr : row(t.value, p.value_stride, token);
      if (values_lie && value) {
        s.value[key] = reinterpret_cast<const float*>(value);
      } else {
        this->take_value(value, key);
        s.value[key / P::COUNT] = s.values + key / P::COUNT * p.value_dim;
      }
    });
  }

  // Transposes rows of keys into columns, with zeros past the last key.
  void keys_to_columns(int steps, ptrdiff_t pitch) const {
    float* zeros = s.sums;
    std::fill_n(zeros, round_up(steps, W), 0.f);
    for (ptrdiff_t k = keys(); k < pitch; k++) s.key[k] = zeros;
    for (ptrdiff_t k = 0; k < pitch; k += W) {
      for (int i = 0; i < steps; i += W) {
        const float* rows[W];
        for (int l = 0; l < W; l++) rows[l] = s.key[k + l] + i;
        simd::transpose(rows, s.columns + i * pitch + k, pitch, std::min(W, steps - i));
      }
    }
    for (int i = 0; i < steps; i++) s.key[i] = s.columns + i * pitch;
  }

  // Copies a query in steps.
  void take_row(int64_t query, float* out) const {
    const int dim = static_cast<int>(p.dim);
    const int64_t token = query_row(query);
    const F sign = simd::set1(p.scale < 0 ? -1.f : 1.f);
    float* floats = std::is_same_v<P, Floats> ? out : s.rows;
    to_floats(row(t.query, p.query_stride, token), floats, dim);
    if (t.row_table) this->rotate(floats, token);
    for (int c = 0; c < dim; c += W) simd::store(floats + c, simd::load(floats + c) * sign);
    if constexpr (!std::is_same_v<P, Floats>) {
      from_floats(floats, reinterpret_cast<T*>(out), dim + dim % 2);
    }
  }

  // Turns the scores of a query into weights, in steps, in place; returns their sum. Scores past
  // the last key have no weight.
  float weigh_row(float* score) const {
    const int rest = (keys() - 1) % W + 1;
    float* const last = score + keys() - rest;
    float inside[W], tops[W];
    for (int l = 0; l < W; l++) {
      inside[l] = l < rest ? 1.f : 0.f;
      if (l >= rest) last[l] = std::numeric_limits<float>::lowest();
    }
    F most = simd::load(last);
    for (const float* x = score; x < last; x += W) most = simd::max(most, simd::load(x));
    simd::store(tops, most);
    const F top = simd::set1(*std::max_element(tops, tops + W));
    const F scale = simd::set1(std::fabs(static_cast<float>(p.scale)) * LOG2E);
    const F shift = simd::zero() - top * scale;
    F sum = simd::zero();
    for (float* x = score; x <= last; x += W) {
      F weight = simd::exp2(simd::fma(simd::load(x), scale, shift));
      if (x == last) weight = weight * simd::load(inside);  // with a scale of zero they are 1
      sum = sum + weight;
      if constexpr (std::is_same_v<P, Floats>) {
        simd::store(x, weight);
      } else {
        simd::store_from_float(reinterpret_cast<T*>(score) + (x - score), weight);
      }
    }
    return simd::reduce_add(sum);
  }
};

// ---- tiles of queries --------------------------------------------------------------------------
constexpr int BLOCK = 128;  // keys at a time, so that scores, keys and values about fit in L1
constexpr int64_t TASK_QUERIES = 512;

// A group with its queries processed in tiles; its keys are copied once.
template <class T, class P>
struct Tiles : Group<T, P> {
  using Group<T, P>::p;
  using Group<T, P>::t;
  using Group<T, P>::s;
  using Group<T, P>::row;
  using Group<T, P>::query_row;

  void take_keys() const {
    this->each_key([&](int64_t token, int key) {
      this->take_key(token, key);
      this->take_value(token < 0 ? nullptr : row(t.value, p.value_stride, token), key);
    });
  }

  // Loads queries as columns; lanes without a query repeat the last one.
  void take_queries(int64_t first, int count) const {
    const int dim = static_cast<int>(p.dim), pitch = round_up(dim, W);
    const F sign = simd::set1(p.scale < 0 ? -1.f : 1.f);
    for (int v = 0; v * W < count; v++) {
      for (int l = 0; l < W; l++) {
        const int64_t soon = first + v * W + l + TILE;
        if (soon < p.queries) this->prefetch(row(t.query, p.query_stride, query_row(soon)), p.dim);
        const int64_t token = query_row(first + std::min(v * W + l, count - 1));
        float* floats = s.rows + l * pitch;
        to_floats(row(t.query, p.query_stride, token), floats, dim);
        if (t.row_table) this->rotate(floats, token);
      }
      for (int c = 0; c < pitch; c += W) {
        float* out = s.query + c * TILE + v * W;
        simd::transpose(s.rows + c, pitch, out, TILE, W);
        for (int i = 0; i < W; i++) simd::store(out + i * TILE, simd::load(out + i * TILE) * sign);
      }
      pack_steps(s.query + v * W, simd::steps<P>(dim));
    }
  }

  // [number][TILE] -> [step][TILE], for one vector.
  static void pack_steps(float* columns, int count) {
    if constexpr (!std::is_same_v<P, Floats>) {
      for (int i = 0; i < count; i++) {
        const float* two = columns + 2 * i * TILE;
        simd::store(columns + i * TILE, P::pack(simd::load(two), simd::load(two + TILE)));
      }
    }
  }

  void give(int64_t first, int count, const float* total) const {
    const int dim = static_cast<int>(p.value_dim), pitch = round_up(dim, W);
    for (int v = 0; v * W < count; v++) {
      const F factor = simd::set1(1.f) / simd::load(total + v * W);
      for (int c = 0; c < dim; c++) {
        float* sum = s.sums + c * TILE + v * W;
        simd::store(sum, simd::load(sum) * factor);
      }
      for (int c = 0; c < pitch; c += W) {
        simd::transpose(s.sums + c * TILE + v * W, TILE, s.rows + c, pitch, W);
      }
      for (int l = 0; l < W && v * W + l < count; l++) {
        this->give_row(query_row(first + v * W + l), s.rows + l * pitch);
      }
    }
  }

  // Turns a block's scores of one vector into weights in place; returns their sums.
  F weigh(float* score, int keys, F scale, F top) const {
    const F shift = simd::zero() - top * scale;
    F sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
    float* out = score;
    const auto take = [&](int i) VB_INLINE_LAMBDA {
      const F x = simd::exp2(simd::fma(simd::load(score), scale, shift));
      score += TILE;
      sums[i] = sums[i] + x;
      return x;
    };
    const auto put = [&](F x) VB_INLINE_LAMBDA {
      simd::store(out, x);
      out += TILE;
    };
    int k = 0;
    if constexpr (std::is_same_v<P, Floats>) {
      for (; k + 4 <= keys; k += 4) {
        VB_UNROLL
        for (int i = 0; i < 4; i++) put(take(i));
      }
      for (; k < keys; k++) put(take(0));
    } else {
      for (; k + 4 <= keys; k += 4) {
        VB_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const F x = take(i), y = take(i + 1);
          put(P::pack(x, y));
        }
      }
      for (; k < keys; k += 2) {
        const F x = take(0), y = k + 1 < keys ? take(1) : simd::zero();
        put(P::pack(x, y));
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void attend(int64_t first, int count) const {
    const int vectors = (count + W - 1) / W, keys = this->keys();
    const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
    const F scale = simd::set1(std::fabs(static_cast<float>(p.scale)) * LOG2E);
    const float lowest = std::numeric_limits<float>::lowest();
    float top[TILE], total[TILE] = {}, factor[TILE];
    std::fill_n(top, TILE, lowest);
    ScoreArgs score{s.query, nullptr, simd::steps<P>(dim), {}, {}, nullptr, top};
    const int32_t* lines[VECTORS] = {};
    for (int v = 0; t.terms && v < vectors; v++) {
      const int64_t query = first + v * W, blocks = (p.queries + LINE - 1) / LINE;
      score.terms[v] = t.terms + this->head * p.term_lines * LINE + query % LINE;
      lines[v] = t.lines + ((t.kinds ? t.kinds[this->group] : 0) * blocks + query / LINE) * keys;
    }
    for (int begin = 0; begin < keys; begin += BLOCK) {
      const int block = std::min(BLOCK, keys - begin);
      float before[TILE];
      std::copy_n(top, TILE, before);
      in_parts(block, [&](int k, int part) {
        score.keys = s.keys + (begin + k) * score.steps;
        score.scores = s.scores + k * TILE;
        for (int v = 0; t.terms && v < vectors; v++) score.lines[v] = lines[v] + begin + k;
        SCORE<P>[vectors - 1][part - 1](score);
      });
      for (int v = 0; v < vectors; v++) {
        const F now = simd::load(top + v * W);
        const F sum = weigh(s.scores + v * W, block, scale, now);
        const F f = simd::exp2((simd::load(before + v * W) - now) * scale);
        simd::store(factor + v * W, f);
        simd::store(total + v * W, simd::fma(simd::load(total + v * W), f, sum));
      }
      const float* values = s.values + begin / P::COUNT * value_dim;
      in_parts(value_dim, [&](int c, int part) {
        MIX<P>[vectors - 1][part - 1]({s.scores, values + c, simd::steps<P>(block), value_dim,
                                       begin ? factor : nullptr, s.sums + c * TILE});
      });
    }
    give(first, count, total);
  }
};

// For one head and group. Threads split a group's queries if there are fewer groups than threads.
static int64_t queries_a_task(const Problem& p) {
  const int64_t of_a_thread = (p.batch * p.groups * p.queries + p.threads - 1) / p.threads;
  return std::clamp<int64_t>(round_up(of_a_thread, W), TILE, TASK_QUERIES);
}

template <class T, class P>
static void forward(const Problem& p, const Tensors& t) {
  const int64_t keys = p.region_keys * p.routes, groups = p.batch * p.groups;
  const bool few = are_few(p, t);
  const int64_t chunk_queries = few ? p.queries : queries_a_task(p);
  const int64_t chunks = (p.queries + chunk_queries - 1) / chunk_queries;
  const int64_t row_keys = round_up(keys, LANES);
  const auto work = [&](int64_t index) {
    static thread_local ScratchBuffer<float> buffers[7];
    static thread_local ScratchBuffer<const float*> places[2];
    Scratch s{buffers[0].of(round_up(keys, LANES) * p.dim + W),
              buffers[1].of((keys + 1) * p.value_dim + LANES),
              buffers[2].of(round_up(p.dim, LANES) * TILE),
              buffers[3].of(W * std::max(round_up(p.dim, LANES), round_up(p.value_dim, LANES))),
              buffers[4].of(std::max(int64_t{BLOCK * TILE}, few ? MAX_QUERIES * row_keys : 0)),
              buffers[5].of(std::max(round_up(p.value_dim, LANES) * TILE, round_up(p.dim, LANES))),
              buffers[6].of(few ? round_up(p.dim, LANES) * row_keys : 0),
              places[0].of(few ? std::max(row_keys, p.dim) : 0),
              places[1].of(few ? keys : 0)};
    // Heads of the same tokens are consecutive tasks: they are adjacent in memory, and threads
    // should not share cache lines.
    const int64_t head = index % p.heads, chunk = index / p.heads % chunks;
    const int64_t group = index / (p.heads * chunks);
    const Group<T, P> own{p, t, group / p.groups, group % p.groups, head, s};
    if (few) return FewQueries<T, P>{own}.run();
    const Tiles<T, P> tiles{own};
    tiles.take_keys();
    const int64_t end = std::min(p.queries, (chunk + 1) * chunk_queries);
    for (int64_t i = chunk * chunk_queries; i < end; i += TILE) {
      const int count = static_cast<int>(std::min<int64_t>(TILE, end - i));
      tiles.take_queries(i, count);
      tiles.attend(i, count);
    }
  };
  parallel::for_each(groups * chunks * p.heads, p.threads, work);
}

}  // namespace attention

// The C interface, called from grouped.py and gated.py.
extern "C" int attention_forward(const attention::Problem* problem,
                                 const attention::Tensors* tensors) {
  return status_of([&] {
    using namespace attention;
    if (!problem->bfloat16) {
      forward<float, Floats>(*problem, *tensors);
    } else if (tensors->row_table) {  // rotated values would have to be rounded
      forward<BFloat16, Floats>(*problem, *tensors);
    } else {
      forward<BFloat16, simd::Products<BFloat16>>(*problem, *tensors);
    }
  });
}
