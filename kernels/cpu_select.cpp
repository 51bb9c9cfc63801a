// loki::select on the CPU.
//
// Three stages: plan each row (budget, sink, recent), score its middle (cpu_score.h), keep the best
// (cpu_topk.h); the last two in one parallel region. Scores are held as int32 keys that order as the
// floats do, in scratch. Where a group chooses by probability the scores of its heads are held
// first, and the keys are made of them once the sums of their softmaxes are known. Where a row's
// budget is a share of its softmax, or what it leaves out is asked for, keys that are always kept are
// scored as well: the softmax is over all that the row sees.

#include "cpu_topk.h"

namespace loki {
namespace {

struct SelectParams {
  View4 q;            // (B, Hq, S, D)
  View4 basis;        // (1 or B, Hkv, D, R) float; or none: q meets the index as it is
  View4 index;        // (B, Hkv, T, R); without a basis (B, Hkv, T, D), or pages (B, Hkv, P, 2 D)
  View4 index_scale;  // (B, Hkv, T, 1) float, or none
  View4 mask;         // (B, Hq, S, T) after broadcasting, or none
  View4 bounds;       // leading dims as mask, 3; int32, or none
  View4 budgets;      // (B, heads, S, 2) after broadcasting; int32, or none: as `top_k` says
  int32_t* positions; // (B, heads, S, slots)
  int64_t slots, top_k, keep_q16, sink, recent, min_keys, per_head, threads;
  int64_t keys, page, by_probability;  // T; keys per row of the index
  float* weighed;  // (B, heads, S, 2): keys chosen, share of the softmax left out; or null
  double scale, mass;  // mass: the share that the keys of a row hold, 0: as many as `top_k` says
};

// Positions fetched ahead of the ones being scored: rows without gaps, while these are; others.
constexpr int64_t kNext = 2 * kBlock, kAhead = 8 * kBlock;
constexpr int64_t kMaxKeys = 1 << 24;  // scores held at once, unless one pair has more

// `chooser` is the row's head among those that choose, h the query head that speaks for it.
RowPlan plan_row(const SelectParams& p, const MaskRow& mask, int64_t i, int64_t h, int64_t chooser,
                 int64_t s) {
  RowPlan row{};
  int64_t t = p.keys;
  int64_t count = t;
  row.end = t;
  if (mask.dtype != kNone) {
    const int32_t* bounds = p.bounds.row<int32_t>(i, h, s);
    row.start = min_of<int64_t>(max_of<int64_t>(bounds[0], 0), t);
    row.end = min_of<int64_t>(max_of<int64_t>(bounds[1], row.start), t);
    count = min_of<int64_t>(max_of<int64_t>(bounds[2], 0), row.end - row.start);
  }
  row.holes = count != row.end - row.start;
  int64_t recent = min_of(p.recent, count);
  int64_t sink = min_of(p.sink, count - recent);
  int64_t share = min_of((count * p.keep_q16 + 65535) >> 16, p.top_k);
  int64_t budget = count < p.min_keys ? count : max_of(share, sink + recent);
  if (p.budgets.dtype != kNone) {
    const int32_t* own = p.budgets.row<int32_t>(i, chooser, s);
    budget = min_of(min_of(max_of<int64_t>(own[0], 0), count), p.slots);
    recent = min_of(max_of<int64_t>(own[1], 0), budget);
    sink = min_of(p.sink, budget - recent);
  }
  row.first = row.start;
  row.last = row.end;
  if (row.holes) {
    for (int64_t left = sink; left > 0 && row.first < row.end; ++row.first) {
      left -= visible(mask, row.first);
    }
    for (int64_t left = recent; left > 0 && row.last > row.first; --row.last) {
      left -= visible(mask, row.last - 1);
    }
  } else {
    row.first += sink;
    row.last -= recent;
  }
  row.count = count;
  row.middle = count - sink - recent;
  row.take = budget - sink - recent;
  row.weighed = row.middle > 0 && count >= p.min_keys && budget > 0 &&
                (p.mass > 0 || (p.weighed && budget < count));
  return row;
}

class Select {
 public:
  explicit Select(const SelectParams& p)
      : p_(p),
        hq_(p.q.size[1]), s_(p.q.size[2]), d_(p.q.size[3]),
        hkv_(p.index.size[1]), t_(p.keys), r_(p.index.size[3]),
        group_(hq_ / hkv_), heads_(p.per_head ? hq_ : hkv_),
        pairs_(p.q.size[0] * hkv_), rows_(p.q.size[0] * heads_ * s_),
        low_rank_(p.basis.dtype != kNone), additive_(p.mask.dtype != kNone && p.mask.dtype != kBool),
        columns_(round_up(r_, low_rank_ ? 16 : 32)),
        // One head ranks alike by its scores and by its probabilities.
        summed_(p.by_probability && heads_ != hq_ ? group_ : 0),
        key_stride_(round_up(t_, 16) + kBlock), row_stride_(key_stride_ * max_of<int64_t>(summed_, 1)),
        score_rows_(score_rows_of(p.index.dtype, p.q.dtype)) {}

  // Bytes of scratch that could not be had, then nothing is written; else 0.
  int64_t run() {
    int64_t bytes = pairs_ * (t_ / p_.page + 1) * r_ * p_.index.element_size();
    parts_ = parts_for(bytes, p_.threads);
    int64_t pairs_at_once =
        min_of(max_of<int64_t>(kMaxKeys / (rows_per_pair() * row_stride_), 1), pairs_);
    if (int64_t missing = allocate(pairs_at_once)) return missing;
    plan();
    for (int64_t first = 0; first < pairs_; first += pairs_at_once) {
      take(first, min_of(first + pairs_at_once, pairs_));
    }
    return 0;
  }

 private:
  // A pair is a batch entry and a KV head. [from, to) holds every position its rows score.
  struct Span {
    int64_t from, to, first_tile;
  };

  // Query head that speaks for a row, in the mask and the bounds.
  int64_t batch_of(int64_t row) const { return row / (heads_ * s_); }
  int64_t head_of(int64_t row) const { return row / s_ % heads_ * (hq_ / heads_); }
  int64_t token_of(int64_t row) const { return row % s_; }
  MaskRow mask_of(int64_t row) const {
    return MaskRow(p_.mask, batch_of(row), head_of(row), token_of(row));
  }
  int64_t rows_per_pair() const { return rows_ / pairs_; }
  int64_t row_of(int64_t pair, int64_t g, int64_t s) const {
    return p_.per_head ? (pair * group_ + g) * s_ + s : pair * s_ + s;
  }

  // Pairs [first, stop).
  void take(int64_t first, int64_t stop) {
    first_row_ = first * rows_per_pair();
    int64_t first_tile = spans_[first].first_tile, tiles = spans_[stop].first_tile - first_tile;
    auto tile_of = [&](int64_t part) { return first_tile + tiles * part / parts_; };
    in_parallel(parts_, [&](int64_t me, int64_t workers) {
      char* room = rooms_ + me * room_bytes_;
      for (int64_t part = me; part < parts_; part += workers) {
        score_tiles(tile_of(part), tile_of(part + 1), room, part);
      }
#pragma omp barrier
      for (int64_t part = summed_ ? me : parts_; part < parts_; part += workers) {
        sum_tiles(tile_of(part), tile_of(part + 1), room);
      }
      if (summed_) {
#pragma omp barrier
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t row = first_row_; row < stop * rows_per_pair(); ++row) {
        emit(row, reinterpret_cast<int32_t*>(room));
      }
    });
  }

  int32_t* keys_of(int64_t row) const { return keys_ + (row - first_row_) * row_stride_; }

  // Where the scores of a group are summed: those of head g of a row, and what a part has of the
  // sums over its keys.
  float* logits_of(int64_t row, int64_t g) const {
    return reinterpret_cast<float*>(keys_of(row)) + g * key_stride_;
  }
  Mass* masses_of(int64_t row, int64_t part) const {
    return masses_ + (part * rows_at_once_ + row - first_row_) * summed_;
  }

  // As `run` in what it returns.
  int64_t allocate(int64_t pairs_at_once) {
    thread_local Scratch scratch;
    int64_t padded_heads = round_up(group_, 8);
    int64_t per_token = padded_heads * (columns_ * (4 + kLimbs) + 4 * (kLimbs + 1));
    int64_t query_bytes = s_ * group_ * sizeof(Query) + s_ * per_token;
    room_bytes_ = round_up(max_of(query_bytes + tail_bytes(), 4 * key_stride_ * 4), 64);
    int64_t plan_bytes = round_up(rows_ * sizeof(RowPlan), 64);
    int64_t span_bytes = round_up((pairs_ + 1) * sizeof(Span), 64);
    rows_at_once_ = pairs_at_once * rows_per_pair();
    int64_t key_bytes = rows_at_once_ * row_stride_ * 4;
    int64_t mass_bytes = round_up(parts_ * rows_at_once_ * summed_ * sizeof(Mass), 64);
    int64_t wanted = plan_bytes + span_bytes + mass_bytes + parts_ * room_bytes_ + key_bytes;
    char* at = static_cast<char*>(scratch.reserve(wanted));
    if (!at) return wanted;
    plans_ = reinterpret_cast<RowPlan*>(at);
    spans_ = reinterpret_cast<Span*>(at += plan_bytes);
    masses_ = reinterpret_cast<Mass*>(at += span_bytes);
    rooms_ = at += mass_bytes;
    keys_ = reinterpret_cast<int32_t*>(at + parts_ * room_bytes_);
    return 0;
  }

  void plan() {
    for (int64_t row = 0; row < rows_; ++row) {
      int64_t chooser = row / s_ % heads_;
      plans_[row] = plan_row(p_, mask_of(row), batch_of(row), head_of(row), chooser, token_of(row));
    }
    int64_t tiles = 0;
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      Span span{t_, 0, tiles};
      for (int64_t n = 0; n < rows_per_pair(); ++n) {
        const RowPlan& row = plans_[pair * rows_per_pair() + n];
        if (!row.scored()) continue;
        // A softmax is over what is always kept as well.
        bool whole = summed_ || row.weighed;
        span.from = min_of(span.from, whole ? row.start : row.first);
        span.to = max_of(span.to, whole ? row.end : row.last);
      }
      if (span.to > span.from) tiles += (span.to - span.from + kTile - 1) / kTile;
      spans_[pair] = span;
    }
    spans_[pairs_] = Span{0, 0, tiles};
  }

  // f(pair, from, to): the positions of tiles [tile, stop), pair after pair.
  template <class F>
  void for_spans(int64_t tile, int64_t stop, F&& f) const {
    for (int64_t pair = 0; tile < stop; ++pair) {
      const Span& span = spans_[pair];
      int64_t pair_stop = min_of(stop, spans_[pair + 1].first_tile);
      if (pair_stop <= tile) continue;
      int64_t from = span.from + (tile - span.first_tile) * kTile;
      f(pair, from, min_of(span.from + (pair_stop - span.first_tile) * kTile, span.to));
      tile = pair_stop;
    }
  }

  void score_tiles(int64_t tile, int64_t stop, char* room, int64_t part) {
    for (int64_t i = 0; i < rows_at_once_ * summed_; ++i) masses_of(first_row_, part)[i] = Mass{};
    for_spans(tile, stop, [&](int64_t pair, int64_t from, int64_t to) {
      int64_t blocks = project(pair, room);
      const Query* queries = reinterpret_cast<const Query*>(room);
      if (!summed_ && low_rank_) return score_span(pair, from, to, queries, blocks, room);
      for (; from < to; from += kTile) {
        int64_t end = min_of(from + kTile, to);
        if (low_rank_) {
          score_span(pair, from, end, queries, blocks, room);
        } else {
          score_tile(pair, from, end, queries, blocks);
        }
        for (int64_t n = 0; n < (summed_ ? rows_per_pair() : 0); ++n) {
          int64_t row = pair * rows_per_pair() + n;
          if (!plans_[row].scored()) continue;
          for (int64_t g = 0; g < group_; ++g) {
            masses_of(row, part)[g].add(logits_of(row, g) + from, round_up(end - from, kBlock));
          }
        }
      }
    });
  }

  // Makes keys of the logits that `score_tiles` left.
  void sum_tiles(int64_t tile, int64_t stop, char* room) {
    float* log_mass = reinterpret_cast<float*>(room);
    for_spans(tile, stop, [&](int64_t pair, int64_t from, int64_t to) {
      for (int64_t row = pair * rows_per_pair(); row < (pair + 1) * rows_per_pair(); ++row) {
        if (!plans_[row].scored()) continue;
        for (int64_t g = 0; g < group_; ++g) {
          Mass mass;
          for (int64_t part = 0; part < parts_; ++part) mass.add(masses_of(row, part)[g]);
          log_mass[g] = mass.log();
        }
        for (int64_t t = from; t < to; t += 16) {
          sum_probabilities(logits_of(row, 0) + t, key_stride_, group_, log_mass, keys_of(row) + t);
        }
      }
    });
  }

  // Writes the pair's queries at the start of the room, token after token; returns how many
  // blocks of heads a token has.
  int64_t project(int64_t pair, char* room) const {
    Query* query = reinterpret_cast<Query*>(room);
    char* at = room + s_ * group_ * sizeof(Query);
    int64_t blocks = 0;
    for (int64_t s = 0; s < s_; ++s) {
      blocks = 0;
      for (int64_t g = 0; g < group_; g += query[-1].heads, ++blocks) {
        int64_t heads = head_block(group_ - g);
        query->first_head = g;
        query->heads = heads;
        query->value = reinterpret_cast<float*>(at);
        query->offset = reinterpret_cast<int32_t*>(at += columns_ * heads * 4);
        query->step = reinterpret_cast<float*>(at += kLimbs * heads * 4);
        query->limb = reinterpret_cast<int8_t*>(at += heads * 4);
        at += kLimbs * columns_ * heads;
        query->fixed_point = fits_fixed_point(r_) && p_.index.dtype == kInt8;
        if (!low_rank_) std::memset(query->value, 0, columns_ * heads * 4);
        for (int64_t x = 0; x < heads; ++x) {
          if (!low_rank_) {
            load_head(pair, min_of(g + x, group_ - 1), s, x, query);
            continue;
          }
          project_head(pair, min_of(g + x, group_ - 1), s, x, query);
          if (query->fixed_point) fix_point(x, query);
        }
        ++query;
      }
    }
    return blocks;
  }

  // A head that meets keys or pages as it is.
  void load_head(int64_t pair, int64_t g, int64_t s, int64_t x, Query* query) const {
    bool halves = p_.index.dtype != kFloat32;
    with_float_type(p_.q.dtype, [&](auto type) {
      using E = decltype(type);
      const E* q = p_.q.row<E>(pair / hkv_, pair % hkv_ * group_ + g, s);
      auto load = [&](auto* out) {
        using Q = std::remove_pointer_t<decltype(out)>;
        for (int64_t r = 0; r < r_; ++r) {
          float value = to_float(q[r % d_]);
          if (p_.page > 1) value = bound_weight(value, r < d_);
          from_float(value, out + query_slot<Q>(halves, query->heads, x, r, columns_));
        }
      };
      if (std::is_same_v<E, BFloat16> && bf16_dots(p_.q.dtype, p_.index.dtype)) {
        load(reinterpret_cast<BFloat16*>(query->value));
      } else {
        load(query->value);
      }
    });
  }

  void project_head(int64_t pair, int64_t g, int64_t s, int64_t x, Query* query) const {
    constexpr int64_t kRanks = 64;
    int64_t i = pair / hkv_, h = pair % hkv_;
    const float* basis = p_.basis.row<float>(i, h, 0);
    for (int64_t r0 = 0; r0 < columns_; r0 += kRanks) {
      int64_t ranks = min_of(kRanks, max_of<int64_t>(r_ - r0, 0));
      float low[kRanks] = {};
      with_float_type(p_.q.dtype, [&](auto type) {
        const auto* q = p_.q.row<decltype(type)>(i, h * group_ + g, s);
        for (int64_t d = 0; d < d_; ++d) {
          float value = to_float(q[d]);
          const float* row = basis + d * p_.basis.stride[2] + r0;
          for (int64_t r = 0; r < ranks; ++r) low[r] += value * row[r];
        }
      });
      for (int64_t r = 0; r < min_of(kRanks, columns_ - r0); ++r) {
        query->value[column_slot(query->heads, x, r0 + r, r_)] = low[r] * static_cast<float>(p_.scale);
      }
    }
  }

  void fix_point(int64_t x, Query* query) const {
    float most = 0;
    bool finite = true;
    for (int64_t r = 0; r < r_; ++r) {
      float size = std::fabs(query->value[column_slot(query->heads, x, r, r_)]);
      finite &= size < kInf;
      most = max_of(most, size);
    }
    float step = most / kMaxFixed;
    query->step[x] = step;
    query->fixed_point = finite && (most == 0 || step > std::numeric_limits<float>::min());
    if (!query->fixed_point) return;
    int32_t sum[kLimbs] = {};
    for (int64_t r = 0; r < columns_; ++r) {
      float value = query->value[column_slot(query->heads, x, r, r_)];
      int64_t fixed = most == 0 ? 0 : std::llrint(value / step);
      fixed = max_of<int64_t>(min_of<int64_t>(fixed, kMaxFixed), -kMaxFixed);
      put_fixed(fixed, columns_, r, x, sum, query);
    }
    for (int limb = 0; limb < kLimbs; ++limb) {
      query->offset[limb * query->heads + x] = 128 * sum[limb];
    }
  }

  void score_span(int64_t pair, int64_t from, int64_t to, const Query* queries, int64_t blocks,
                  char* room) {
    if (p_.index.dtype == kInt8) {
      return score_span<int8_t>(pair, from, to, queries, blocks, room);
    }
    with_float_type(p_.index.dtype, [&](auto type) {
      score_span<decltype(type)>(pair, from, to, queries, blocks, room);
    });
  }

  template <class E>
  void score_span(int64_t pair, int64_t from, int64_t to, const Query* queries, int64_t blocks,
                  char* room) {
    const E* index = p_.index.row<E>(pair / hkv_, pair % hkv_, 0);
    const float* scales = p_.index_scale.row<float>(pair / hkv_, pair % hkv_, 0);
    const int64_t scale_stride = p_.index_scale.stride[2];
    float scale_room[kBlock] = {};
    for (int64_t t = from; t < to; t += kBlock) {
      int64_t n = min_of(kBlock, to - t);
      int64_t stride = p_.index.stride[2];
      const E* rows = index + t * stride;
      const char* ahead = nullptr;
      if ((LOKI_AVX512 || LOKI_AVX2) && stride == r_) {
        ahead = reinterpret_cast<const char*>(rows + kNext * stride);
      } else {
        fetch<E>(rows + kAhead * stride, stride * sizeof(E), r_ * sizeof(E));
      }
      const float* row_scale = scale_room;
      if (p_.index.dtype == kInt8 && scale_stride == 1 && n == kBlock) {
        row_scale = scales + t;
        __builtin_prefetch(row_scale + kAhead);
        __builtin_prefetch(row_scale + kAhead + kBlock / 2);
      } else if (p_.index.dtype == kInt8) {
        fetch<float>(scales + (t + kAhead) * scale_stride, scale_stride * 4, 4);
        for (int64_t i = 0; i < n; ++i) scale_room[i] = scales[(t + i) * scale_stride];
      }
      if (t + kBlock > t_) {  // a whole block would read past the cache: copy what there is
        E* copy = reinterpret_cast<E*>(room + room_bytes_ - tail_bytes());
        for (int64_t n = 0; n < t_ - t; ++n) {
          std::memcpy(copy + n * r_, rows + n * stride, r_ * sizeof(E));
        }
        rows = copy;
        stride = r_;
      }
      for (int64_t s = 0; s < s_; ++s) {
        score_token(pair, s, t, n, queries + s * blocks, blocks, rows, stride, row_scale, ahead);
        ahead = nullptr;
      }
    }
  }

  // One block of rows into the cache. Left to itself the hardware keeps up with a seventh of the
  // memory's speed here.
  template <class E>
  static void fetch(const void* rows, int64_t stride_bytes, int64_t row_bytes) {
    const char* row = static_cast<const char*>(rows);
    if (sizeof(E) == 1 && stride_bytes == row_bytes) {  // one run of lines, fewer than rows
      for (int64_t done = 0; done < kBlock * row_bytes; done += 64) __builtin_prefetch(row + done);
      return;
    }
    int64_t rows_per_line = max_of<int64_t>(64 / max_of<int64_t>(stride_bytes, 1), 1);
    for (int64_t n = 0; n < kBlock; n += rows_per_line) {
      for (int64_t done = 0; done < row_bytes; done += 64) {
        __builtin_prefetch(row + n * stride_bytes + done);
      }
    }
  }

  template <class E>
  void score_token(int64_t pair, int64_t s, int64_t t, int64_t n, const Query* queries,
                   int64_t blocks, const E* rows, int64_t stride, const float* row_scale,
                   const char* ahead) {
    float best[kBlock], each[8 * kBlock];
    for (int64_t i = 0; i < kBlock; ++i) best[i] = -kInf;
    Scores to{shares() ? best : nullptr, shares() ? nullptr : each, row_scale, ahead};
    for (const Query* query = queries; query < queries + blocks; ++query) {
      score_heads(rows, stride, r_, *query, to);
      to.ahead = nullptr;
      if (shares()) continue;
      for (int64_t x = 0; x < own_heads(*query); ++x) {
        store_block(pair, query->first_head + x, s, t, n, each + x * kBlock);
      }
    }
    if (shares()) store_block(pair, 0, s, t, n, best);
  }

  // Whether the best score over a group is all that is wanted of it.
  bool shares() const { return !p_.per_head && !summed_; }
  int64_t own_heads(const Query& query) const {
    return min_of(query.heads, group_ - query.first_head);
  }

  // Positions [from, to), a tile at most, of keys or pages.
  void score_tile(int64_t pair, int64_t from, int64_t to, const Query* queries, int64_t blocks) {
    int64_t first = from / p_.page, n = (to - 1) / p_.page + 1 - first;
    int64_t stride = p_.index.stride[2];
    int64_t at = pair / hkv_ * p_.index.step(0) + pair % hkv_ * p_.index.step(1) + first * stride;
    const char* rows = p_.index.data + at * p_.index.element_size();
    float score[8 * kTileRows], best[kTileRows];
    for (int64_t s = 0; s < s_; ++s) {
      for (int64_t i = 0; i < kTileRows; ++i) best[i] = -kInf;
      for (const Query* query = queries + s * blocks; query < queries + (s + 1) * blocks; ++query) {
        int64_t width = query->heads == 8 ? 3 : query->heads / 2;  // its place among 1, 2, 4 and 8
        score_rows_[width](rows, stride, n, query->value, r_, static_cast<float>(p_.scale), score);
        for (int64_t x = 0; x < own_heads(*query); ++x) {
          float* mine = score + x * kTileRows;
          if (p_.page > 1) bound_again(pair, query->first_head + x, s, rows, n, mine);
          if (shares()) {
            // NaN compares as false and leaves the best as it is.
            for (int64_t i = 0; i < n; ++i) best[i] = mine[i] > best[i] ? mine[i] : best[i];
          } else {
            store_tile(pair, query->first_head + x, s, from, to, mine);
          }
        }
      }
      if (shares()) store_tile(pair, 0, s, from, to, best);
    }
  }

  // The scores of pages that came out as NaN.
  void bound_again(int64_t pair, int64_t g, int64_t s, const char* rows, int64_t n,
                   float* score) const {
    for (int64_t i = 0; i < n; ++i) {
      if (score[i] == score[i]) continue;
      with_float_type(p_.q.dtype, [&](auto q_type) {
        with_float_type(p_.index.dtype, [&](auto type) {
          using Q = decltype(q_type);
          using E = decltype(type);
          const E* page = reinterpret_cast<const E*>(rows) + i * p_.index.stride[2];
          const Q* q = p_.q.row<Q>(pair / hkv_, pair % hkv_ * group_ + g, s);
          score[i] = page_bound(q, page, d_) * static_cast<float>(p_.scale);
        });
      });
    }
  }

  // The scores of the rows from that of `from` on, to positions [from, to).
  void store_tile(int64_t pair, int64_t g, int64_t s, int64_t from, int64_t to,
                  const float* score) {
    float spread[kTileRows];
    if (p_.page > 1) {
      int64_t page = 0, left = p_.page - from % p_.page;
      for (int64_t i = 0; i < to - from; ++i) {
        spread[i] = score[page];
        if (--left == 0) left = p_.page, ++page;
      }
      score = spread;
    }
    for (int64_t t = from; t < to; t += kBlock) {
      store_block(pair, g, s, t, min_of(kBlock, to - t), score + (t - from));
    }
  }

  void store_block(int64_t pair, int64_t g, int64_t s, int64_t t, int64_t n, const float* score) {
    int64_t row = row_of(pair, g, s);
    const RowPlan& plan = plans_[row];
    if (!plan.scored()) return;
    if (summed_) {
      store_logits(score, mask_of(row), plan, t, n, logits_of(row, g) + t);
    } else if (plan.weighed || (t + n > plan.first && t < plan.last)) {
      // Whose keys they are takes divisions, and is asked of few.
      const MaskRow mask = plan.holes || additive_ ? mask_of(row) : MaskRow();
      store_keys(score, mask, plan, t, n, keys_of(row) + t);
    }
  }

  // What the visible keys of a row weigh together, and what those do that are always kept, each
  // relative to the highest finite score.
  struct Weights {
    float most = -kInf, total = 0, always = 0;
  };

  Weights weigh(const RowPlan& plan, const int32_t* key) const {
    Weights found;
    int32_t most = kHidden;
    const int32_t infinite = ordered_key(kInf);
    for (int64_t t = plan.start; t < plan.end; ++t) {
      most = key[t] < infinite && key[t] > most ? key[t] : most;
    }
    if (most == kHidden || score_of(most) == -kInf) return found;
    found.most = score_of(most);
    float before = sum_of_weights(key, plan.start, plan.first, found.most);
    float behind = sum_of_weights(key, plan.last, plan.end, found.most);
    found.always = before + behind;
    found.total = found.always + sum_of_weights(key, plan.first, plan.last, found.most);
    return found;
  }

  static float sum_of_weights(const int32_t* key, int64_t from, int64_t to, float most) {
    float lane[16] = {};
    int64_t t = from;
    for (; t + 16 <= to; t += 16) {
#pragma omp simd
      for (int l = 0; l < 16; ++l) lane[l] += weight_of(key[t + l], most);
    }
    for (; t < to; ++t) lane[t % 16] += weight_of(key[t], most);
    float sum = 0;
    for (int l = 0; l < 16; ++l) sum += lane[l];
    return sum;
  }

  // Puts the best of the middle into slots, adding to what they weigh and how many they are.
  void put_best(const RowPlan& plan, const int32_t* key, const Weights& weights, int32_t* room,
                SlotWriter* slots, Heap* chosen) const {
    int64_t n = plan.last - plan.first;
    int64_t take = min_of(plan.take, n);
    if (take <= 0) return;
    int32_t low = n > kFew ? bracket(key + plan.first, n, take).low : kLowest;
    Candidates found = gather(key, plan.first, plan.last, max_of(low, kLowest), room);
    if (found.n < take) found = gather(key, plan.first, plan.last, kLowest, room);
    take = min_of(take, found.n);
    if (take <= 0) return;
    int32_t* more_room = room + 2 * n;
    Threshold threshold{};
    int64_t fewest = take + 1;
    if (p_.mass > 0 && weights.total > 0) {
      // By their total the share is rounded once, whatever the weights are relative to.
      float need = static_cast<float>(p_.mass) * weights.total - weights.always;
      if (need <= 0) return;
      float* weight = reinterpret_cast<float*>(more_room + n);
      for (int64_t i = 0; i < found.n; ++i) {
        more_room[i] = found.key[i];
        weight[i] = weight_of(found.key[i], weights.most);
      }
      if (heap_from(more_room, weight, found.n, kLowest).weight >= need) {
        threshold = lightest(more_room, weight, found.n, need, &fewest);
      }
    }
    if (fewest > take) threshold = find_threshold(found.key, found.n, take, more_room);
    if (plan.weighed) {
      for (int64_t i = 0; i < found.n; ++i) {
        if (found.key[i] > threshold.key) chosen->weight += weight_of(found.key[i], weights.most);
      }
      chosen->weight += threshold.equal * weight_of(threshold.key, weights.most);
      chosen->count += min_of(fewest, take);
    }
    slots->put_best(found, threshold);
  }

  void emit(int64_t row, int32_t* room) const {
    const RowPlan& plan = plans_[row];
    const MaskRow mask = mask_of(row);
    SlotWriter slots(p_.positions + row * p_.slots, p_.slots);
    Weights weights;
    if (plan.weighed) weights = weigh(plan, keys_of(row));
    Heap chosen{weights.always, plan.count - plan.middle};
    slots.put_visible(plan.start, plan.first, mask, plan.holes);
    if (plan.scored()) {
      put_best(plan, keys_of(row), weights, room, &slots, &chosen);
    } else if (plan.take > 0) {
      slots.put_visible(plan.first, plan.last, mask, plan.holes);
    }
    slots.put_visible(plan.last, plan.end, mask, plan.holes);
    slots.finish();
    if (!p_.weighed) return;
    float left_out = plan.weighed && weights.total > 0 ? 1.0f - chosen.weight / weights.total : 0.0f;
    int64_t taken = plan.weighed ? chosen.count : plan.count - plan.middle + plan.take;
    p_.weighed[2 * row] = static_cast<float>(taken);
    p_.weighed[2 * row + 1] = max_of(left_out, 0.0f);
  }

  int64_t tail_bytes() const { return round_up(kBlock * r_ * 4, 64); }

  const SelectParams& p_;
  const int64_t hq_, s_, d_, hkv_, t_, r_, group_, heads_, pairs_, rows_;
  const bool low_rank_, additive_;
  const int64_t columns_, summed_, key_stride_, row_stride_;  // summed_: heads, or 0
  const ScoreRows* const score_rows_;
  int64_t parts_ = 1, room_bytes_ = 0, first_row_ = 0, rows_at_once_ = 0;
  RowPlan* plans_ = nullptr;
  Span* spans_ = nullptr;
  Mass* masses_ = nullptr;
  char* rooms_ = nullptr;
  int32_t* keys_ = nullptr;
};

}  // namespace
}  // namespace loki

// Returns the bytes of scratch memory that could not be had; then nothing is written. Else 0.
extern "C" __attribute__((visibility("default"))) int64_t loki_select(
    const loki::SelectParams* params) {
  return loki::Select(*params).run();
}
