// loki::attend on the CPU.
//
// A query is one query head of one token. A row is the queries that are taken together: the heads that
// share a list of positions, or, where there are no lists and all keys, or two ranges of them, are
// read, the heads and a few tokens, so that a block of keys is read once for all of them. A unit is
// the rows that read the same keys: one row, or all rows of a KV head. The work is the units' slots,
// cut into blocks, and these into parts, runs of blocks. Each part leaves, for each row it touched, a
// partial softmax (maximum, sum, weighted V).
//
// q, k, the rest of k, and v each have a float type of their own (under autocast the cache's differs
// from that of queries), so what reads rows is compiled for one type each and chosen once per call.

#include "cpu_rows.h"

namespace loki {
namespace {

struct AttendParams {
  View4 q;          // (B, Hq, S, D)
  View4 k;          // (B, Hkv, T, D), or the first dims of keys
  View4 rest;       // (B, Hkv, T, the other dims of keys), or none
  View4 v;          // (B, Hkv, T, Dv)
  View4 positions;  // (B, Hkv or Hq, S, K) int32, or none: all keys
  View4 ranges;     // (B, Hkv, S, 4) int32 after broadcasting, or none: all keys
  View4 mask;       // (B, Hq, S, T) after broadcasting, or none
  View4 sink_logits;  // (1, 1, 1, Hq) floating, or none
  void* out;        // (B, Hq, S, Dv), dtype of q
  int64_t threads;
  double scale, softcap;
};

constexpr int64_t kSlots = 64;         // slots in a block
constexpr int64_t kMaxHeads = 8;       // queries in a block: those that a key is loaded once for
constexpr int64_t kMaxTokens = 8;      // tokens of a row
constexpr int64_t kStrip = 16;         // rows of V taken through all their dims together
// Slots fetched ahead. K and V are each fetched while they are themselves read, whole rows at once.
constexpr int64_t kAhead = 32;
// Bytes of keys and values that the rows of a unit read in turn, out of the second cache.
constexpr int64_t kTurn = 1 << 18;
constexpr int64_t kCombinedAlone = 1 << 16;  // numbers that the calling thread combines alone
constexpr int64_t kSumUnit = 256;  // sums of heads lie a multiple of this apart

// Dims of V whose sums are held in registers, for 1, 2, 4 or 8 heads.
constexpr int64_t piece_of(int64_t heads) {
#if LOKI_AVX512
  return heads == 1 ? 128 : 256 / heads;
#else
  return kSums * kLanes / (heads < kTileHeads ? heads : kTileHeads);
#endif
}
template <int GB>
constexpr int64_t kPiece = piece_of(GB);

// After Cephes tanhf.
inline float tanh_of(float x) {
  float size = std::fabs(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  float small = p * z * x + x;
  float large = 1.0f - 2.0f / (exp_of(size > 40.0f ? 80.0f : 2.0f * size) + 1.0f);
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// Positions that all tokens of a row read, and what the mask adds there for each. Blocks are taken
// from its front.
struct Queue {
  int64_t n = 0, tokens = 1;
  bool biased = false;
  int32_t position[2 * kSlots + kAhead];
  float bias[kMaxTokens][2 * kSlots + kAhead];

  // Where slot i will be read, or the last that there is.
  int32_t at_most(int64_t i) const { return position[min_of(i, n - 1)]; }

  void drop(int64_t count) {
    n -= count;
    std::memmove(position, position + count, n * sizeof(*position));
    if (!biased) return;
    for (int64_t t = 0; t < tokens; ++t) std::memmove(bias[t], bias[t] + count, n * sizeof(float));
  }
};

#if LOKI_AVX512

// logit[i * GB + head] = q . k for the first n of the queue, n > 0; k of E, q of Q.
template <class E, class Q, int GB>
void dots(const void* rows, int64_t stride, const Queue& queue, int64_t n, const void* queries,
          int64_t d, float* logit) {
  const E* k = static_cast<const E*>(rows);
  const Q* q = static_cast<const Q*>(queries);
  constexpr int kRows = 16 / GB;
  for (int64_t first = 0; first < n; first += kRows) {
    const E *row[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = k + queue.position[min_of(first + i, n - 1)] * stride;
      ahead[i] = k + queue.at_most(first + i + kAhead) * stride;
    }
    _mm512_storeu_ps(logit + first * GB, dot_rows<E, Q, GB>(row, ahead, q, d));
  }
}

// sum[head * kPiece<GB> + dim] += weight . v for dims [0, left), kPiece<GB> of them at most, and slots
// [from, to) of the queue. `ahead`: bytes of each row to fetch for later slots, or 0.
template <bool Whole, class E, int GB>
LOKI_INLINE inline void accumulate_piece(const E* v, int64_t stride, const Queue& queue,
                                         int64_t from, int64_t to, const float* weight,
                                         int64_t left, int64_t ahead, float* sum) {
  constexpr int kVectors = Chunk<E>::kVectors;
  constexpr int kChunks = kPiece<GB> / Chunk<E>::kSize, kParts = kChunks * kVectors;
  __m512 part[GB * kParts];
  unroll<GB * kParts>([&](auto i) LOKI_INLINE { part[i] = _mm512_loadu_ps(sum + 16 * i); });
  for (int64_t i = from; i < to; ++i) {
    const E* row = v + queue.position[i] * stride;
    if (ahead) prefetch(v + queue.at_most(i + kAhead) * stride, ahead);
    __m512 weights[GB];
    unroll<GB>([&](auto g) LOKI_INLINE { weights[g] = _mm512_set1_ps(weight[i * GB + g]); });
    unroll<kChunks>([&](auto c) LOKI_INLINE {
      constexpr int64_t done = c * Chunk<E>::kSize;
      if (!Whole && done >= left) return;
      __m512i raw = load_chunk<Whole>(row + done, left - done);
      unroll<kVectors>([&](auto half) LOKI_INLINE {
        __m512 value = unpack<half>(raw, E{});
        unroll<GB>([&](auto g) LOKI_INLINE {
          constexpr int i = g * kParts + c * kVectors + half;
          part[i] = _mm512_fmadd_ps(value, weights[g], part[i]);
        });
      });
    });
  }
  unroll<GB * kParts>([&](auto i) LOKI_INLINE { _mm512_storeu_ps(sum + 16 * i, part[i]); });
}

#else

template <class E, class Q, int GB>
void dots(const void* rows, int64_t stride, const Queue& queue, int64_t n, const void* queries,
          int64_t d, float* logit) {
  const E* k = static_cast<const E*>(rows);
  constexpr int kRows = kRowsOf<GB>;
  for (int64_t first = 0; first < n; first += kRows) {
    const E *row[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = k + queue.position[min_of(first + i, n - 1)] * stride;
      ahead[i] = k + queue.at_most(first + i + kAhead) * stride;
    }
    dot_rows<E, Q, GB>(row, ahead, d, static_cast<const Q*>(queries), round_up(d, 32),
                       logit + first * GB);
  }
}

template <bool Whole, class E, int GB>
LOKI_INLINE inline void accumulate_piece(const E* v, int64_t stride, const Queue& queue,
                                         int64_t from, int64_t to, const float* weight,
                                         int64_t left, int64_t ahead, float* sum) {
  constexpr int kHeads = kHeadsOf<GB>, kChunks = kPiece<GB> / 8;
  for (int first = 0; first < GB; first += kHeads, sum += kHeads * kPiece<GB>, ahead = 0) {
    Float8 part[kHeads * kChunks];
    unroll<kHeads * kChunks>([&](auto i) LOKI_INLINE { part[i] = load8(sum + 8 * i); });
    for (int64_t i = from; i < to; ++i) {
      const E* row = v + queue.position[i] * stride;
      if (ahead) prefetch(v + queue.at_most(i + kAhead) * stride, ahead);
      const float* weights = weight + i * GB + first;
      unroll<kChunks>([&](auto c) LOKI_INLINE {
        if (!Whole && 8 * c >= left) return;
        Float8 value = Whole || left >= 8 * c + 8 ? load8(row + 8 * c)
                                                  : load8(row + 8 * c, left - 8 * c);
        unroll<kHeads>([&](auto g) LOKI_INLINE {
          add_product(&part[g * kChunks + c], value, weights[g]);
        });
      });
    }
    unroll<kHeads * kChunks>([&](auto i) LOKI_INLINE { store8(part[i], sum + 8 * i); });
  }
}

#endif

// Sums of all dims, piece after piece, for the first n of the queue. A strip of rows at a time goes
// through all of them: its lines come from memory once and in order.
template <class E, int GB>
void accumulate(const void* rows, int64_t stride, const Queue& queue, int64_t n,
                const float* weight, int64_t dv, float* sum) {
  const E* v = static_cast<const E*>(rows);
  for (int64_t from = 0; from < n; from += kStrip) {
    int64_t to = min_of(from + kStrip, n);
    for (int64_t done = 0; done < dv; done += kPiece<GB>) {
      auto piece = done + kPiece<GB> <= dv ? accumulate_piece<true, E, GB>
                                           : accumulate_piece<false, E, GB>;
      int64_t ahead = done == 0 ? dv * sizeof(E) : 0;
      piece(v + done, stride, queue, from, to, weight, dv - done, ahead, sum + done * GB);
    }
  }
}

// `dots` and `accumulate` of one type of rows, for 1, 2, 4 and 8 heads.
using Dots = void (*)(const void*, int64_t, const Queue&, int64_t, const void*, int64_t, float*);
using Accumulate = void (*)(const void*, int64_t, const Queue&, int64_t, const float*, int64_t,
                            float*);

inline const Dots* dots_of(int64_t k_dtype, int64_t q_dtype) {
  const Dots* found = nullptr;
  with_row_types(k_dtype, q_dtype, [&](auto row, auto query) {
    using E = decltype(row);
    using Q = decltype(query);
    static constexpr Dots all[] = {dots<E, Q, 1>, dots<E, Q, 2>, dots<E, Q, 4>, dots<E, Q, 8>};
    found = all;
  });
  return found;
}

inline const Accumulate* accumulate_of(int64_t dtype) {
  const Accumulate* found = nullptr;
  with_float_type(dtype, [&](auto type) {
    using E = decltype(type);
    static constexpr Accumulate all[] = {accumulate<E, 1>, accumulate<E, 2>, accumulate<E, 4>,
                                         accumulate<E, 8>};
    found = all;
  });
  return found;
}

// Partial softmax of a few heads: logits to weights, in place. Slots past `n` are at -inf.
// Returns in rescale what the sums so far must be multiplied by.
template <int GB>
void soften(float* logit, int64_t n, float* most, float* total, float* rescale) {
  float lane_most[16], lane_total[16];
  for (int l = 0; l < 16; ++l) lane_most[l] = most[l % GB];
  for (int64_t i = 0; i < n * GB; i += 16) {
#pragma omp simd
    for (int l = 0; l < 16; ++l) lane_most[l] = max_of(logit[i + l], lane_most[l]);
  }
  for (int g = 0; g < GB; ++g) {
    float highest = lane_most[g];
    for (int l = g; l < 16; l += GB) highest = max_of(lane_most[l], highest);
    float base = highest == -kInf ? 0.0f : highest;  // all at -inf: the weights become 0
    rescale[g] = exp_of(most[g] - base);
    most[g] = highest;
    for (int l = g; l < 16; l += GB) lane_most[l] = base;
  }
  for (int64_t i = 0; i < n * GB; i += 16) {
#pragma omp simd
    for (int l = 0; l < 16; ++l) logit[i + l] -= lane_most[l];
  }
#pragma omp simd
  for (int64_t i = 0; i < n * GB; ++i) logit[i] = exp_of(logit[i]);
  for (int l = 0; l < 16; ++l) lane_total[l] = 0;
  for (int64_t i = 0; i < n * GB; i += 16) {
#pragma omp simd
    for (int l = 0; l < 16; ++l) lane_total[l] += logit[i + l];
  }
  for (int g = 0; g < GB; ++g) {
    float sum = 0;
    for (int l = g; l < 16; l += GB) sum += lane_total[l];
    total[g] = total[g] * rescale[g] + sum;
  }
}

class Attend {
 public:
  explicit Attend(const AttendParams& p)
      : p_(p),
        hq_(p.q.size[1]), s_(p.q.size[2]), d_(p.k.size[3]), hkv_(p.k.size[1]), t_(p.k.size[2]),
        rest_(p.q.size[3] - d_), dv_(p.v.size[3]),
        slots_(p.positions.dtype == kNone ? 0 : p.positions.size[3]),
        lists_(slots_ ? p.positions.size[1] : hkv_),
        heads_(lists_ == hkv_ && p.mask.step(1) == 0 ? hq_ / hkv_ : 1),
        tokens_(slots_ ? 1 : min_of(s_, kMaxTokens)), together_(heads_ * tokens_),
        groups_((s_ + tokens_ - 1) / tokens_),
        rows_(p.q.size[0] * hq_ / heads_ * groups_),
        rows_per_unit_(slots_ ? 1 : hq_ / heads_ / hkv_ * groups_),
        units_(rows_ / rows_per_unit_),
        sum_stride_(round_up(dv_, kSumUnit)),
        partial_stride_(round_up(together_, kMaxHeads) * (sum_stride_ + 16)),
        query_size_(round_up(d_, 32) + round_up(rest_, 32)),
        query_floats_(round_up(together_, kMaxHeads) * query_size_),
        k_bytes_(p.k.element_size()), rest_bytes_(p.rest.element_size()),
        v_bytes_(p.v.element_size()),
        key_bytes_(d_ * k_bytes_ + rest_ * rest_bytes_ + dv_ * v_bytes_),
        dots_(dots_of(p.k.dtype, p.q.dtype)), rest_dots_(dots_of(p.rest.dtype, p.q.dtype)),
        accumulate_(accumulate_of(p.v.dtype)) {}

  // Bytes of scratch that could not be had, then nothing is written; else 0.
  int64_t run() {
    if (int64_t missing = find_spans()) return missing;
    parts_ = parts_for(blocks_ * kSlots * key_bytes_, p_.threads);
    thread_local Scratch scratch;
    int64_t query_floats = rows_per_unit_ * query_floats_;
    int64_t partials = (units_ + parts_) * rows_per_unit_ + parts_;
    int64_t wanted = 4 * (parts_ * query_floats + partials * partial_stride_);
    float* room = static_cast<float*>(scratch.reserve(wanted));
    if (!room) return wanted;
    partials_ = room + parts_ * query_floats;
    // What little there is to combine is not worth waiting for another thread.
    bool shared = rows_ * together_ * dv_ > kCombinedAlone;
    in_parallel(parts_, [&](int64_t me, int64_t workers) {
      for (int64_t part = me; part < parts_; part += workers) {
        work(part, room + part * query_floats);
      }
      if (!shared) return;
#pragma omp barrier
      combine(units_ * me / workers, units_ * (me + 1) / workers);
    });
    if (!shared) combine(0, units_);
    return 0;
  }

 private:
  // Slots [first, stop) that a unit has to look at: of its list, or, if `dense`, of all keys, which
  // a row without any position reads. Dense slots from `gap_at` on lie `gap` keys further behind.
  struct Span {
    int64_t first, stop, first_block;
    bool dense;
    int64_t gap_at = 0, gap = 0;
  };

  // Keys [first, first_stop) and [last, last_stop).
  struct Ranges {
    int64_t first, first_stop, last, last_stop;
  };

  int64_t batch_of(int64_t row) const { return row / groups_ / (hq_ / heads_); }
  int64_t head_of(int64_t row) const { return row / groups_ % (hq_ / heads_) * heads_; }
  // Of a row its first token, and how many there are; its queries are token after token.
  int64_t token_of(int64_t row) const { return row % groups_ * tokens_; }
  int64_t tokens_of(int64_t row) const { return min_of(tokens_, s_ - token_of(row)); }
  int64_t kv_head_of(int64_t row) const { return head_of(row) / (hq_ / hkv_); }
  const int32_t* positions_of(int64_t row) const {
    int64_t h = lists_ == hkv_ ? kv_head_of(row) : head_of(row);
    return p_.positions.row<int32_t>(batch_of(row), h, token_of(row));
  }
  // Of token `t` of a row: all keys where it has none.
  Ranges ranges_of(int64_t row, int64_t t) const {
    if (p_.ranges.dtype == kNone) return {0, t_, t_, t_};
    const int32_t* given =
        p_.ranges.row<int32_t>(batch_of(row), kv_head_of(row), token_of(row) + t);
    int64_t end[4], least = 0;
    for (int i = 0; i < 4; ++i) end[i] = least = min_of(max_of<int64_t>(given[i], least), t_);
    if (end[0] == end[1] && end[2] == end[3]) return {0, t_, t_, t_};
    return {end[0], end[1], end[2], end[3]};
  }
  MaskRow mask_of(int64_t row, int64_t t) const {
    return MaskRow(p_.mask, batch_of(row), head_of(row), token_of(row) + t);
  }
  bool valid(int32_t position) const {
    return static_cast<uint32_t>(position) < static_cast<uint32_t>(t_);
  }

  // As `run` in what it returns.
  int64_t find_spans() {
    thread_local Scratch scratch;
    int64_t wanted = (units_ + 1) * sizeof(Span);
    spans_ = static_cast<Span*>(scratch.reserve(wanted));
    if (!spans_) return wanted;
    blocks_ = 0;
    for (int64_t unit = 0; unit < units_; ++unit) {
      int64_t used = slots_;
      const int32_t* position = used ? positions_of(unit) : nullptr;
      while (used > 0 && !any_valid(position + max_of<int64_t>(used - kSlots, 0),
                                    min_of(kSlots, used))) {
        used = max_of<int64_t>(used - kSlots, 0);
      }
      spans_[unit] = used ? Span{0, used, blocks_, false}
                     : p_.ranges.dtype == kNone ? span_of_all(unit)
                                                : span_of_ranges(unit);
      blocks_ += (spans_[unit].stop - spans_[unit].first + kSlots - 1) / kSlots;
    }
    spans_[units_].first_block = blocks_;
    return 0;
  }

  // f(row, token of the row) for all of a unit.
  template <class F>
  void for_tokens(int64_t unit, F&& f) const {
    for (int64_t row = unit * rows_per_unit_; row < (unit + 1) * rows_per_unit_; ++row) {
      for (int64_t t = 0; t < tokens_of(row); ++t) f(row, t);
    }
  }

  // What any row of the unit reads, between the first and the last of it without the gap that all
  // of them share.
  Span span_of_ranges(int64_t unit) const {
    Ranges all = ranges_of(unit * rows_per_unit_, 0);
    for_tokens(unit, [&](int64_t row, int64_t t) {
      Ranges own = ranges_of(row, t);
      all.first = min_of(all.first, own.first);
      all.first_stop = max_of(all.first_stop, own.first_stop);
      all.last = min_of(all.last, own.last);
      all.last_stop = max_of(all.last_stop, own.last_stop);
    });
    if (all.first == all.first_stop) all.first = all.first_stop = all.last;
    int64_t gap = max_of<int64_t>(all.last - all.first_stop, 0);
    int64_t stop = max_of(all.last_stop, all.first_stop) - gap;
    return {all.first, stop, blocks_, true, all.first_stop, gap};
  }

  // What any row of the unit sees of all keys.
  Span span_of_all(int64_t unit) const {
    int64_t row = unit * rows_per_unit_, first = t_, stop = 0;
    if (p_.mask.dtype == kNone) return {0, t_, blocks_, true};
    if (unit && spans_[unit - 1].dense && p_.mask.step(1) == 0 &&
        batch_of(row) == batch_of(row - 1) &&
        (groups_ == rows_per_unit_ || p_.mask.step(2) == 0)) {
      return {spans_[unit - 1].first, spans_[unit - 1].stop, blocks_, true};  // as its neighbour
    }
    for_tokens(unit, [&](int64_t each, int64_t t) {
      MaskRow mask = mask_of(each, t);
      first = min_of(first, mask.next_seen(0, t_));
      stop = max_of(stop, mask.seen_until(0, t_));
    });
    return {min_of(first, stop), stop, blocks_, true};
  }

  bool any_valid(const int32_t* position, int64_t n) const {
    int32_t any = 0;
    for (int64_t i = 0; i < n; ++i) any |= valid(position[i]);
    return any;
  }

  bool all_valid(const int32_t* position, int64_t n) const {
    int32_t all = 1;
    for (int64_t i = 0; i < n; ++i) all &= valid(position[i]);
    return all;
  }

  // Appends what a row of one token reads of the dense slots [from, to) of its unit.
  void fill_ranges(const Ranges& own, const Span& span, int64_t from, int64_t to,
                   const MaskRow& mask, Queue* queue) const {
    int64_t cut = span.gap ? min_of(max_of(span.gap_at, from), to) : to;
    const int64_t runs[2][2] = {{from, cut}, {cut + span.gap, to + span.gap}};
    for (auto& run : runs) {
      int64_t stop = min_of(run[1], own.first_stop), first = max_of(run[0], own.first);
      if (first < stop) fill(nullptr, first, stop, mask, queue);
      stop = min_of(run[1], own.last_stop), first = max_of(run[0], own.last);
      if (first < stop) fill(nullptr, first, stop, mask, queue);
    }
  }

  // Appends slots [from, to) of a row, without those that read nothing.
  void fill(const int32_t* position, int64_t from, int64_t to, const MaskRow& mask,
            Queue* queue) const {
    if (mask.dtype == kNone && position && all_valid(position + from, to - from)) {
      std::memcpy(queue->position + queue->n, position + from, (to - from) * sizeof(int32_t));
      queue->n += to - from;
      return;
    }
    if (mask.dtype == kNone && !position) {
      for (int64_t i = from; i < to; ++i) {
        queue->position[queue->n + i - from] = static_cast<int32_t>(i);
      }
      queue->n += to - from;
      return;
    }
    if (!position) from = mask.next_seen(from, to);
    for (int64_t i = from; i < to; ++i) {
      int32_t at = position ? position[i] : static_cast<int32_t>(i);
      if (!valid(at)) continue;
      float bias = mask.bias(at);
      queue->position[queue->n] = at;
      queue->bias[0][queue->n] = bias;
      queue->n += bias != -kInf;
    }
  }

  // Of the dense slots [from, to) of its unit, at most kSlots, appends to `queue` what all tokens of a
  // row read, and to `edges`, for each token its own, what some of them do: among neighbours that is
  // little. Whether there is any.
  bool fill_together(int64_t row, const Span& span, int64_t from, int64_t to, Queue* queue,
                     Queue* edges) const {
    const int64_t tokens = tokens_of(row), n = to - from;
    if (p_.mask.dtype == kNone && p_.ranges.dtype == kNone) {
      fill(nullptr, from, to, MaskRow(), queue);
      return false;
    }
    uint8_t seen[kMaxTokens][kSlots], all[kSlots], any[kSlots] = {};
    float bias[kMaxTokens][kSlots];
    std::memset(all, 1, sizeof(all));
    const int64_t behind = span.gap ? min_of(max_of(span.gap_at - from, int64_t{0}), n) : n;
    auto key_of = [&](int64_t i) { return from + i + (i < behind ? 0 : span.gap); };
    for (int64_t t = 0; t < tokens; ++t) {
      const MaskRow mask = mask_of(row, t);
      if (mask.dtype == kBool && mask.stride == 1) {
        std::memcpy(seen[t], mask.data + from, behind);
        std::memcpy(seen[t] + behind, mask.data + from + behind + span.gap, n - behind);
      } else if (mask.dtype == kNone) {
        std::memset(seen[t], 1, n);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          bias[t][i] = mask.bias(key_of(i));
          seen[t][i] = bias[t][i] != -kInf;
        }
      }
      if (p_.ranges.dtype != kNone) {
        const Ranges own = ranges_of(row, t);
        for (int64_t i = 0; i < n; ++i) {
          int64_t key = key_of(i);
          seen[t][i] &= (key >= own.first && key < own.first_stop) ||
                        (key >= own.last && key < own.last_stop);
        }
      }
      for (int64_t i = 0; i < n; ++i) all[i] &= seen[t][i];
      for (int64_t i = 0; i < n; ++i) any[i] |= seen[t][i];
    }
    bool some = false;
    for (int64_t i = 0; i < n; ++i) {
      if (!any[i]) continue;
      const int32_t key = static_cast<int32_t>(key_of(i));
      some |= !all[i];
      for (int64_t t = 0; t < tokens; ++t) {
        if (all[i] && queue->biased) queue->bias[t][queue->n] = bias[t][i];
        if (all[i] || !seen[t][i]) continue;
        edges[t].position[edges[t].n] = key;
        if (queue->biased) edges[t].bias[0][edges[t].n] = bias[t][i];
        ++edges[t].n;
      }
      if (all[i]) queue->position[queue->n++] = key;
    }
    return some;
  }

  // Parts hold consecutive units, and share at most the one at which they meet.
  float* partial(int64_t row, int64_t part) const {
    return partials_ + (row + part * rows_per_unit_) * partial_stride_;
  }
  // Room for one row more, of each part.
  float* spare(int64_t part) const {
    return partials_ + ((units_ + parts_) * rows_per_unit_ + part) * partial_stride_;
  }
  float* most_of(float* partial) const {
    return partial + round_up(together_, kMaxHeads) * sum_stride_;
  }
  float* total_of(float* partial) const {
    return most_of(partial) + round_up(together_, kMaxHeads);
  }

  void work(int64_t part, float* queries) {
    int64_t from = blocks_ * part / parts_, stop = blocks_ * (part + 1) / parts_;
    for (int64_t unit = 0; from < stop; ++unit) {
      int64_t unit_stop = min_of(stop, spans_[unit + 1].first_block);
      if (unit_stop <= from) continue;
      const Span& span = spans_[unit];
      int64_t first = span.first + (from - span.first_block) * kSlots;
      int64_t last = min_of(span.first + (unit_stop - span.first_block) * kSlots, span.stop);
      attend_unit(unit, part, first, last, queries);
      from = unit_stop;
    }
  }

  void attend_unit(int64_t unit, int64_t part, int64_t first, int64_t last, float* queries) {
    int64_t row = unit * rows_per_unit_;
    for (int64_t i = 0; i < rows_per_unit_; ++i) {
      float* mine = partial(row + i, part);
      std::memset(mine, 0, partial_stride_ * sizeof(float));
      for (int64_t g = 0; g < round_up(together_, kMaxHeads); ++g) most_of(mine)[g] = -kInf;
      load_queries(row + i, queries + i * query_floats_);
    }
    int64_t turn = last - first;
    if (rows_per_unit_ > 1) turn = round_up(kTurn / key_bytes_ + 1, kSlots);
    for (; first < last; first += turn) {
      for (int64_t i = 0; i < rows_per_unit_; ++i) {
        const Span& span = spans_[unit];
        const float* mine = queries + i * query_floats_;
        int64_t stop = min_of(first + turn, last);
        attend_slots(row + i, span, first, stop, mine, partial(row + i, part), spare(part));
      }
    }
  }

  // Block after block of queries; in each the dims that meet k, then those that meet the rest, each in
  // the type in which they meet them.
  void load_queries(int64_t row, float* queries) const {
    int64_t size = round_up(d_, 32), rest_size = query_size_ - size;
    const int64_t number = heads_ * tokens_of(row);
    for (int64_t g = 0; g < number;) {
      int64_t heads = head_block(number - g);
      std::memset(queries, 0, heads * query_size_ * sizeof(*queries));
      for (int64_t x = 0; x < heads; ++x) {
        int64_t query = min_of(g + x, number - 1);
        load_query(row, query, 0, d_, p_.k.dtype, heads, x, size, queries);
        load_query(row, query, d_, rest_, p_.rest.dtype, heads, x, rest_size,
                   queries + heads * size);
      }
      queries += heads * query_size_;
      g += heads;
    }
  }

  // Dims [from, from + dims) of a query of the row as head x of `heads` of `size` dims, for `dots_of`.
  void load_query(int64_t row, int64_t query, int64_t from, int64_t dims, int64_t k_dtype,
                  int64_t heads, int64_t x, int64_t size, float* to) const {
    bool halves = k_dtype != kFloat32;
    with_float_type(p_.q.dtype, [&](auto type) {
      using E = decltype(type);
      int64_t h = head_of(row) + query % heads_, token = token_of(row) + query / heads_;
      const E* q = p_.q.row<E>(batch_of(row), h, token) + from;
      auto load = [&](auto* out) {
        using Q = std::remove_pointer_t<decltype(out)>;
        for (int64_t d = 0; d < dims; ++d) {
          from_float(to_float(q[d]), out + query_slot<Q>(halves, heads, x, d, size));
        }
      };
      if (std::is_same_v<E, BFloat16> && bf16_dots(p_.q.dtype, k_dtype)) {
        load(reinterpret_cast<BFloat16*>(to));
      } else {
        load(to);
      }
    });
  }

  // What a KV head holds.
  struct Rows {
    const char *k, *rest, *v;
  };

  // The first row of a KV head, (T, dims).
  const char* rows_of(const View4& tensor, int64_t row) const {
    int64_t at = batch_of(row) * tensor.step(0) + kv_head_of(row) * tensor.step(1);
    return tensor.data + at * tensor.element_size();
  }

  // What a row reads of slots [first, last) of its unit. `spare`: room for a partial.
  void attend_slots(int64_t row, const Span& span, int64_t first, int64_t last,
                    const float* queries, float* partial, float* spare) const {
    const MaskRow mask = mask_of(row, 0);
    const int32_t* position = span.dense ? nullptr : positions_of(row);
    const Ranges own = ranges_of(row, 0);
    const int64_t tokens = tokens_of(row);
    const Rows rows = {rows_of(p_.k, row), rest_ ? rows_of(p_.rest, row) : nullptr,
                       rows_of(p_.v, row)};
    Queue queue;
    queue.tokens = tokens;
    queue.biased = mask.additive();
    for (bool begun = false;; begun = true) {
      for (; first < last && queue.n < kSlots + kAhead; first += kSlots) {
        int64_t stop = min_of(first + kSlots, last);
        if (position) {
          fill(position, first, stop, mask, &queue);
        } else if (tokens == 1) {
          fill_ranges(own, span, first, stop, mask, &queue);
        } else {
          take_together(row, span, first, stop, rows, queries, partial, spare, &queue);
        }
      }
      if (queue.n == 0) return;
      for (int64_t i = 0; !begun && i < min_of(kAhead, queue.n); ++i) {
        prefetch(rows.k + queue.position[i] * p_.k.stride[2] * k_bytes_, d_ * k_bytes_);
        prefetch(rows.v + queue.position[i] * p_.v.stride[2] * v_bytes_, dv_ * v_bytes_);
      }
      int64_t n = min_of(queue.n, kSlots);
      take_queries(rows, queue, n, queries, 0, heads_ * tokens, heads_ * tokens, partial);
      queue.drop(n);
    }
  }

  // Appends what all tokens of a row read of slots [first, stop), and takes what some of them do.
  void take_together(int64_t row, const Span& span, int64_t first, int64_t stop, const Rows& rows,
                     const float* queries, float* partial, float* spare, Queue* queue) const {
    Queue edges[kMaxTokens];
    for (Queue& edge : edges) edge.biased = queue->biased;
    if (!fill_together(row, span, first, stop, queue, edges)) return;
    for (int64_t t = 0; t < queue->tokens; ++t) {
      if (edges[t].n) take_alone(t, queue->tokens, rows, edges[t], queries, partial, spare);
    }
  }

  // Takes keys for the queries of one token of a row. Those of others, which share its blocks, are
  // left as they were: a key that they do not read may hold anything.
  void take_alone(int64_t token, int64_t tokens, const Rows& rows, const Queue& queue,
                  const float* queries, float* partial, float* spare) const {
    const int64_t from = token * heads_, to = from + heads_, number = heads_ * tokens;
    std::memcpy(spare, partial, partial_stride_ * sizeof(float));
    take_queries(rows, queue, queue.n, queries, from, to, number, spare);
    for (int64_t query = from; query < to; ++query) {
      most_of(partial)[query] = most_of(spare)[query];
      total_of(partial)[query] = total_of(spare)[query];
      const int64_t block = query / kMaxHeads * kMaxHeads, heads = head_block(number - block);
      const int64_t piece = piece_of(heads);
      for (int64_t d = 0; d < dv_; d += piece) {
        int64_t at = block * sum_stride_ + d * heads + (query - block) * piece;
        std::memcpy(partial + at, spare + at, piece * sizeof(float));
      }
    }
  }

  // Takes n keys for those of a row's `number` queries that share a block with one of [from, to).
  void take_queries(const Rows& rows, const Queue& queue, int64_t n, const float* queries,
                    int64_t from, int64_t to, int64_t number, float* partial) const {
    for (int64_t g = 0; g < to;) {
      int64_t heads = head_block(number - g);
      if (g + heads > from) {
        switch (heads) {
          case 1: take<1>(rows, queue, n, queries, g, partial); break;
          case 2: take<2>(rows, queue, n, queries, g, partial); break;
          case 4: take<4>(rows, queue, n, queries, g, partial); break;
          default: take<8>(rows, queue, n, queries, g, partial);
        }
      }
      queries += heads * query_size_;
      g += heads;
    }
  }

  // Takes n keys for a block of queries, `first` and those behind it.
  template <int GB>
  void take(const Rows& rows, const Queue& queue, int64_t n, const float* q, int64_t first,
            float* partial) const {
    constexpr int kWidth = GB == 8 ? 3 : GB / 2;  // its place among 1, 2, 4 and 8 heads
    float logit[kSlots * GB], rescale[GB];
    float* sum = partial + first * sum_stride_;
    dots_[kWidth](rows.k, p_.k.stride[2], queue, n, q, d_, logit);
    if (rest_) {
      float more[kSlots * GB];
      const float* q_rest = q + GB * round_up(d_, 32);
      rest_dots_[kWidth](rows.rest, p_.rest.stride[2], queue, n, q_rest, rest_, more);
      for (int64_t i = 0; i < n * GB; ++i) logit[i] += more[i];
    }
    float scale = static_cast<float>(p_.scale);
    for (int64_t i = 0; i < n * GB; ++i) logit[i] *= scale;
    if (p_.softcap > 0) {
      float cap = static_cast<float>(p_.softcap);
#pragma omp simd
      for (int64_t i = 0; i < n * GB; ++i) logit[i] = cap * tanh_of(logit[i] / cap);
    }
    if (queue.biased) {
      for (int g = 0; g < GB; ++g) {
        // Behind the last query of a row lies a repetition of it.
        const float* bias = queue.bias[min_of((first + g) / heads_, queue.tokens - 1)];
        for (int64_t i = 0; i < n; ++i) logit[i * GB + g] += bias[i];
      }
    }
    for (int64_t i = n * GB; i < round_up(n * GB, 16); ++i) logit[i] = -kInf;
    soften<GB>(logit, round_up(n * GB, 16) / GB, most_of(partial) + first,
               total_of(partial) + first, rescale);
    for (int64_t part = 0; part < (dv_ + kPiece<GB> - 1) / kPiece<GB> * GB; ++part) {
      if (rescale[part % GB] == 1.0f) continue;
      for (int64_t d = 0; d < kPiece<GB>; ++d) sum[part * kPiece<GB> + d] *= rescale[part % GB];
    }
    accumulate_[kWidth](rows.v, p_.v.stride[2], queue, n, logit, dv_, sum);
  }

  // Joins what the parts left of units [unit, stop).
  void combine(int64_t unit, int64_t stop) const {
    for (int64_t first = 0; unit < stop; ++unit) {
      int64_t from = spans_[unit].first_block, to = spans_[unit + 1].first_block;
      // Parts [first, last) touched it: part i has blocks [blocks * i / parts, ... (i + 1) / parts).
      while (first < parts_ && blocks_ * (first + 1) / parts_ <= from) ++first;
      int64_t last = first;
      while (from < to && last < parts_ && blocks_ * last / parts_ < to) ++last;
      for (int64_t i = 0; i < rows_per_unit_ * together_; ++i) {
        int64_t row = unit * rows_per_unit_ + i / together_, query = i % together_;
        if (query < heads_ * tokens_of(row)) combine(row, query, first, last);
      }
    }
  }

  void combine(int64_t row, int64_t g, int64_t first, int64_t last) const {
    int64_t h = head_of(row) + g % heads_, token = token_of(row) + g / heads_;
    // A part without blocks lies between others where there are more parts than blocks.
    auto idle = [&](int64_t i) { return blocks_ * i / parts_ == blocks_ * (i + 1) / parts_; };
    float sink = p_.sink_logits.dtype == kNone ? -kInf : MaskRow(p_.sink_logits, 0, 0, 0).bias(h);
    float most = sink;
    for (int64_t t = first; t < last; ++t) {
      if (!idle(t)) most = max_of(most_of(partial(row, t))[g], most);
    }
    float base = most == -kInf ? 0.0f : most;
    float total = sink == -kInf ? 0.0f : exp_of(sink - base);
    for (int64_t t = first; t < last; ++t) {
      if (idle(t)) continue;
      float* part = partial(row, t);
      total += total_of(part)[g] * exp_of(most_of(part)[g] - base);
    }
    float inverse = total == 0 ? 0.0f : 1.0f / total;
    // Heads lie in blocks of `heads`, each piece after piece of dims.
    int64_t block = g / kMaxHeads * kMaxHeads;
    int64_t heads = head_block(heads_ * tokens_of(row) - block), piece = piece_of(heads);
    int64_t first_out = ((batch_of(row) * hq_ + h) * s_ + token) * dv_;
    for (int64_t d0 = 0; d0 < dv_; d0 += piece) {
      float sum[128] = {};
      for (int64_t t = first; t < last; ++t) {
        if (idle(t)) continue;
        float* part = partial(row, t);
        float weight = exp_of(most_of(part)[g] - base) * inverse;
        const float* mine = part + block * sum_stride_ + d0 * heads + (g - block) * piece;
        for (int64_t d = 0; d < piece; ++d) sum[d] += weight * mine[d];
      }
      with_float_type(p_.q.dtype, [&](auto type) {
        auto* out = static_cast<decltype(type)*>(p_.out) + first_out + d0;
        for (int64_t d = 0; d < min_of(piece, dv_ - d0); ++d) {
          from_float(sum[unpacked_slot(v_bytes_ == 2, d)], out + d);
        }
      });
    }
  }

  const AttendParams& p_;
  const int64_t hq_, s_, d_, hkv_, t_, rest_, dv_, slots_, lists_;
  // Heads and tokens of a row, both together, and rows that the tokens of a head make.
  const int64_t heads_, tokens_, together_, groups_, rows_, rows_per_unit_;
  const int64_t units_, sum_stride_, partial_stride_, query_size_, query_floats_;
  const int64_t k_bytes_, rest_bytes_, v_bytes_, key_bytes_;
  const Dots* const dots_;
  const Dots* const rest_dots_;
  const Accumulate* const accumulate_;
  int64_t blocks_ = 0, parts_ = 1;
  Span* spans_ = nullptr;
  float* partials_ = nullptr;
};

}  // namespace
}  // namespace loki

// Returns the bytes of scratch memory that could not be had; then nothing is written. Else 0.
extern "C" __attribute__((visibility("default"))) int64_t loki_attend(
    const loki::AttendParams* params) {
  return loki::Attend(*params).run();
}
