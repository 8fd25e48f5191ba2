// The gradients of keys and values. Every tile of queries adds to the gradients of the keys around
// it, so a work item keeps the rows that its current tile sees in a ring buffer. A row that no
// later tile of the item sees leaves the ring. It is written to the caller's tensor, except for
// positions that other items see, too: their shares are stored and added in a fixed order when all
// items are done.
#pragma once
#include "neighborhood/scatter.h"
#include "neighborhood/work_item.h"

namespace na {

static inline float* zeroed(Buffer& b, size_t n) {
  float* p = b.get(n);
  std::fill_n(p, n, 0.f);  // n may be 0 and p null
  return p;
}

// One item's share of the gradients that other items also contribute to.
struct KeyGradients {
  Buffer keys, values;  // [key that other items see][channel], plane by plane, row by row
  Buffer additional_keys, additional_values;
  Buffer bias;  // [head of the group][rpb]
};

// Calls run_item(index, shares of its block of heads) for all items, and for each head, when all of
// its items are done, store_head(batch, head, shares) and, in order, add_head(head, shares).
// shares[head of the block * items per head + item]
template <class RunItem, class StoreHead, class AddHead>
static void accumulate(const Problem& p, const Layout& layout, const RunItem& run_item,
                       const StoreHead& store_head, const AddHead& add_head) {
  const int per_head = layout.items_per_head, block = layout.head_block;
  const int64_t blocks = p.batch * layout.head_blocks, threads = layout.threads(p);
  // Blocks of heads are processed in waves just large enough to keep the threads busy, so that few
  // shares are stored.
  const int64_t wave = std::min(blocks, threads > 1 ? (4 * threads + per_head - 1) / per_head : 1);
  static thread_local std::vector<KeyGradients> kept;
  const size_t kept_count = static_cast<size_t>(wave) * block * per_head;
  if (kept.size() < kept_count) kept = std::vector<KeyGradients>(kept_count);
  KeyGradients* shares = kept.data();
  for (int64_t first = 0; first < blocks; first += wave) {
    const int64_t count = std::min(wave, blocks - first);
    parallel::for_each_in_turn(count * per_head, threads, [&](int64_t i) {
      run_item(first * per_head + i, shares + i / per_head * block * per_head);
    });
    // The heads of the wave; the last block may have fewer.
    const auto head_of = [&](int64_t i) {
      return static_cast<int>((first + i / block) % layout.head_blocks * block + i % block);
    };
    parallel::for_each_in_turn(count * block, threads, [&](int64_t i) {
      if (head_of(i) >= p.kv_heads) return;
      store_head(static_cast<int>((first + i / block) / layout.head_blocks), head_of(i),
                 shares + i * per_head);
    });
    for (int64_t i = 0; i < count * block; i++) {
      if (head_of(i) < p.kv_heads) add_head(head_of(i), shares + i * per_head);
    }
  }
}

template <class T>
class GradientRing {
 public:
  // Starts the gradient of `t` times `scale` for the heads of one item. share(head) is the buffer
  // for the shares of a head. `large`: the results do not fit the caches.
  void start(const WorkItem& item, const Tensor& t, int channels, float scale, bool large) {
    layout_ = &item.layout;
    item_ = &item;
    tensor_ = t;
    channels_ = channels;
    scale_ = scale;
    stream_ = large && fills_lines<T>(t, channels);
    row_size_ = static_cast<size_t>(item.segment.columns) * round_up(channels, W);
    left_ = entered_ = item.chunk.low;
    rows_.get(static_cast<size_t>(item.heads) * layout_->z.size * layout_->ring_rows * row_size_);
  }

  // Prepares for the next tile, which sees the key rows [low, high).
  template <class Share>
  void advance(int low, int high, const Share& share) {
    for (; left_ < low; left_++) {
      if (left_ == entered_) clear(entered_++);  // a row that no query sees
      for (int h = 0; h < item_->heads; h++) {
        for (int z = 0; z < layout_->z.size; z++) leave(h, z, left_, share(h));
      }
    }
    while (entered_ < high) clear(entered_++);
  }
  template <class Share>
  void finish(const Share& share) {
    advance(item_->chunk.high, item_->chunk.high, share);
  }

  // Prefetches the destinations of rows that leave before `low`, unless stores bypass the caches.
  void add_leaving(Prefetch& prefetch, int head, int z, int low) const {
    for (int y = left_; y < low && !stream_; y++) prefetch.add(line(head, z, y), tensor_.x, channels_);
  }

  // [key column of the segment][channel]
  float* row(int head, int z, int y) const {
    const size_t plane = static_cast<size_t>(head) * layout_->z.size + z;
    return rows_.data() + (plane * layout_->ring_rows + y % layout_->ring_rows) * row_size_;
  }

 private:
  T* line(int head, int z, int y) const {
    return static_cast<T*>(tensor_.data) + tensor_.at(item_->batch, layout_->z.order[z],
                                                      layout_->y.order[y],
                                                      item_->first_head + head);
  }

  void clear(int y) {
    for (int h = 0; h < item_->heads; h++) {
      for (int z = 0; z < layout_->z.size; z++)
        std::memset(row(h, z, y), 0, row_size_ * sizeof(float));
    }
  }

  void leave(int head, int z, int y, float* share) {
    const int pitch = round_up(channels_, W);
    const Segment& segment = item_->segment;
    const float* from = row(head, z, y);
    T* out = line(head, z, y);
    share += item_->shared_keys(z, y) * pitch;
    for (int i = 0; i < segment.columns; i++, from += pitch) {
      const int x = segment.low + i;
      if (!layout_->seen_once(y, x)) {
        std::memcpy(share, from, pitch * sizeof(float));
        share += pitch;
      } else {
        store_channels(from, channels_, scale_, out + layout_->x.order[x] * tensor_.x, stream_);
      }
    }
  }

  const Layout* layout_ = nullptr;
  const WorkItem* item_ = nullptr;
  Tensor tensor_{};
  int channels_ = 0;
  float scale_ = 1.f;
  bool stream_ = false;
  size_t row_size_ = 0;
  int left_ = 0, entered_ = 0;  // rows before `left_` have left the ring
  Buffer rows_;
};

// Adds and stores the items' shares of one tensor, for keys not seen by exactly one item;
// share(item) is an item's array.
template <class T, class Share>
static void store_key_gradient(const Layout& layout, const Tensor& t, int batch, int head,
                               int channels, float scale, const Share& share) {
  const int pitch = round_up(channels, W);
  const std::vector<int>& columns = layout.column_segments;
  const bool columns_once = std::count(columns.begin(), columns.end(), 1) == layout.x.size;
  Buffer line;
  for (int y = 0; y < layout.y.size; y++) {
    if (layout.row_chunks[y] == 1 && columns_once) continue;
    for (int z = 0; z < layout.z.size; z++) {
      float* sum = zeroed(line, static_cast<size_t>(layout.x.size) * pitch);
      int item = 0;
      for (const Chunk& c : layout.chunks) {
        for (const Segment& s : layout.segments) {
          const float* from = share(item++);
          if (y < c.low || y >= c.high) continue;
          from += layout.shared_keys(c, s, z, y) * pitch;
          for (int x = s.low; x < s.low + s.columns; x++) {
            if (layout.seen_once(y, x)) continue;
            float* to = sum + static_cast<size_t>(x) * pitch;
            for (int i = 0; i < pitch; i += W, from += W)
              simd::store(to + i, simd::load(to + i) + simd::load(from));
          }
        }
      }
      T* out = static_cast<T*>(t.data) + t.at(batch, layout.z.order[z], layout.y.order[y], head);
      for (int x = 0; x < layout.x.size; x++) {
        if (layout.seen_once(y, x)) continue;
        store_channels(sum + static_cast<size_t>(x) * pitch, channels, scale,
                       out + layout.x.order[x] * t.x);
      }
    }
  }
}

template <class T, class Share>
static void store_additional_gradient(const Tensor& t, int n, int items, int batch, int head,
                                      int channels, float scale, const Share& share) {
  if (!n) return;
  const int pitch = round_up(channels, W);
  Buffer line;
  float* sum = zeroed(line, static_cast<size_t>(n) * pitch);
  for (int u = 0; u < items; u++) {
    const float* from = share(u);
    for (size_t i = 0; i < static_cast<size_t>(n) * pitch; i++) sum[i] += from[i];
  }
  for (int i = 0; i < n; i++) {
    store_channels(sum + static_cast<size_t>(i) * pitch, channels, scale,
                   static_cast<T*>(t.data) + t.at(batch, 0, 0, head) + i * t.x);
  }
}

}  // namespace na
