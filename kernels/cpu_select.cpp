// loki::select on the CPU.
//
// Three stages: plan each row (budget, sink, recent), score its middle, keep the best; the last two
// in one parallel region. Scores are held as int32 keys that order as the floats do, in scratch.
// A sample of them bounds the threshold from below, one pass picks the candidates from there up,
// and counting passes over these few find it. Nothing is sorted.

#include "cpu_common.h"

namespace loki {
namespace {

struct SelectParams {
  View4 q;            // (B, Hq, S, D)
  View4 basis;        // (1 or B, Hkv, D, R) float
  View4 index;        // (B, Hkv, T, R)
  View4 index_scale;  // (B, Hkv, T, 1) float, or none
  View4 mask;         // (B, Hq, S, T) after broadcasting, or none
  View4 bounds;       // leading dims as mask, 3; int32, or none
  int32_t* positions; // (B, heads, S, slots)
  int64_t slots, top_k, keep_q16, sink, recent, min_keys, per_head, threads;
  double scale;
};

constexpr int32_t kHidden = std::numeric_limits<int32_t>::min();
constexpr int32_t kLowest = kHidden + 1;  // at or below the key of -inf
constexpr int64_t kBlock = 32;          // positions scored at once
constexpr int64_t kTile = 512;          // positions per unit of work, a multiple of kBlock
constexpr int64_t kAhead = 8 * kBlock;  // positions fetched ahead of the ones being scored
constexpr int64_t kBytesPerThread = 1 << 16;
constexpr int64_t kMaxKeys = 1 << 24;  // scores held at once, unless one pair has more

// The middle [first, last) of a row competes for `take` slots; what is visible before and behind
// it is kept.
struct RowPlan {
  int64_t start, end, first, last, middle, take;
  bool holes;  // some keys in [start, end) are hidden

  bool scored() const { return take > 0 && take < middle; }
};

float hidden_below(int64_t dtype) {
  switch (dtype) {
    case kFloat16: return -65504.0f / 2;
    case kBFloat16: return -3.3895313892515355e38f / 2;
    default: return -std::numeric_limits<float>::max() / 2;
  }
}

bool visible(const MaskRow& mask, int64_t t) {
  return mask.bias(t) > (mask.dtype == kBool ? -1.0f : hidden_below(mask.dtype));
}

RowPlan plan_row(const SelectParams& p, const MaskRow& mask, int64_t i, int64_t h, int64_t s) {
  RowPlan row{};
  int64_t t = p.index.size[2];
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
  row.middle = count - sink - recent;
  row.take = budget - sink - recent;
  return row;
}

// ---- scores ---------------------------------------------------------------------------------

// Where dim r of a query head lies among `heads` of them: side by side for a kernel that scores
// rows in lanes, head after head for one that leaves vectors to the compiler.
inline int64_t query_slot(int64_t heads, int64_t g, int64_t r, [[maybe_unused]] int64_t ranks) {
  return LOKI_AVX512 ? r * heads + g : g * round_up(ranks, 16) + r;
}

// One block of query heads in index space, times the scale: value[query_slot].
// An int8 index is met in fixed point, q = step * (limb 0 + 256 * limb 1), limbs being signed
// bytes, so that q is known to 2**-16 of its largest value, the index itself to 2**-8: limb[((limb * columns / 4 + dim / 4) * heads + head) * 4 + dim % 4].
struct Query {
  int64_t first_head, heads;
  float* value;
  int8_t* limb;
  int32_t* offset;  // [limb * heads + head]: 128 * the sum of the limb over the dims
  float* step;      // [head]
  bool fixed_point;  // only for an int8 index, and a finite q
};

constexpr int kLimbs = 2;
constexpr int32_t kMaxFixed = 127 * (1 + 256);

// What a kernel does with the dots of a block of rows: `best` of kBlock keeps the highest over the
// heads, NaN left aside; or `each` of heads * kBlock takes them as they are. An int8 index
// multiplies them by row_scale.
struct Scores {
  float* best;
  float* each;
  const float* row_scale;
};

#if LOKI_AVX512

// Dword c of the 16-byte chunk at `at` of 16 rows -> column[c], one row per lane.
inline void load_columns(const char* at, int64_t stride_bytes, __mmask16 bytes, __m512i* column) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i) {
    const char* row = at + i * stride_bytes;
    // Hides how the addresses follow from each other. Otherwise the compiler keeps a pointer per
    // row across the chunks, spills most of them, and the loop takes twice as long.
    __asm__("" : "+r"(row));
    if (bytes == 0xffff) {
      auto load = [&](int lane) {
        return _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(row + 4 * lane * stride_bytes));
      };
      part[i] = _mm512_castsi128_si512(load(0));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x00f0, load(1));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x0f00, load(2));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0xf000, load(3));
    } else {
      auto load = [&](int lane) { return _mm_maskz_loadu_epi8(bytes, row + 4 * lane * stride_bytes); };
      part[i] = _mm512_castsi128_si512(load(0));
      part[i] = _mm512_inserti32x4(part[i], load(1), 1);
      part[i] = _mm512_inserti32x4(part[i], load(2), 2);
      part[i] = _mm512_inserti32x4(part[i], load(3), 3);
    }
  }
  __m512i low01 = _mm512_unpacklo_epi32(part[0], part[1]);
  __m512i high01 = _mm512_unpackhi_epi32(part[0], part[1]);
  __m512i low23 = _mm512_unpacklo_epi32(part[2], part[3]);
  __m512i high23 = _mm512_unpackhi_epi32(part[2], part[3]);
  column[0] = _mm512_unpacklo_epi64(low01, low23);
  column[1] = _mm512_unpackhi_epi64(low01, low23);
  column[2] = _mm512_unpacklo_epi64(high01, high23);
  column[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Value i of those packed in one column, for 16 rows.
template <class E>
constexpr int kPerColumn = 4 / sizeof(E);
template <int i, class E>
inline __m512 unpack(__m512i column, E) {
  if constexpr (std::is_same_v<E, float>) {
    return _mm512_castsi512_ps(column);
  } else if constexpr (std::is_same_v<E, int8_t>) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(column, 24 - 8 * i), 24));
  } else if constexpr (std::is_same_v<E, Float16>) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(i == 0 ? column : _mm512_srli_epi32(column, 16)));
  } else if constexpr (i == 0) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(column, 16));
  } else {
    return _mm512_castsi512_ps(
        _mm512_and_si512(column, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

// sum[half * GB + head] of 16 rows each.
template <int GB>
inline void put_scores(const __m512* sum, const Scores& to) {
  unroll<2>([&](auto half) LOKI_INLINE {
    if (to.best) {
      __m512 best = _mm512_loadu_ps(to.best + 16 * half);
      // Of two operands, one of them NaN, max_ps returns the second.
      unroll<GB>([&](auto g) LOKI_INLINE { best = _mm512_max_ps(sum[half * GB + g], best); });
      _mm512_storeu_ps(to.best + 16 * half, best);
    } else {
      unroll<GB>([&](auto g) LOKI_INLINE {
        _mm512_storeu_ps(to.each + g * kBlock + 16 * half, sum[half * GB + g]);
      });
    }
  });
}

inline __mmask16 chunk_bytes(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

template <class E, int GB>
void score_block(const E* rows, int64_t stride, int64_t r, const float* q, const Scores& to) {
  const char* at = reinterpret_cast<const char*>(rows);
  const int64_t stride_bytes = stride * sizeof(E), row_bytes = r * sizeof(E);
  __m512 sum[2 * GB];
  unroll<2 * GB>([&](auto i) LOKI_INLINE { sum[i] = _mm512_setzero_ps(); });
  for (int64_t done = 0; done < row_bytes; done += 16) {
    __m512i column[2][4];
    __mmask16 bytes = chunk_bytes(row_bytes - done);
    load_columns(at + done, stride_bytes, bytes, column[0]);
    load_columns(at + 16 * stride_bytes + done, stride_bytes, bytes, column[1]);
    unroll<4 * kPerColumn<E>>([&](auto i) LOKI_INLINE {
      constexpr int c = i / kPerColumn<E>, e = i % kPerColumn<E>;
      __m512 low_rows = unpack<e>(column[0][c], E{}), high_rows = unpack<e>(column[1][c], E{});
      unroll<GB>([&](auto g) LOKI_INLINE {
        __m512 weight = _mm512_set1_ps(q[i * GB + g]);
        sum[g] = _mm512_fmadd_ps(low_rows, weight, sum[g]);
        sum[GB + g] = _mm512_fmadd_ps(high_rows, weight, sum[GB + g]);
      });
    });
    q += 4 * kPerColumn<E> * GB;
  }
  if constexpr (std::is_same_v<E, int8_t>) {
    unroll<2 * GB>([&](auto i) LOKI_INLINE {
      sum[i] = _mm512_mul_ps(sum[i], _mm512_loadu_ps(to.row_scale + i / GB * 16));
    });
  }
  put_scores<GB>(sum, to);
}

#if LOKI_VNNI
// int8 rows against the fixed-point query.
template <int GB>
void score_block_int8(const int8_t* rows, int64_t stride, int64_t r, const Query& q,
                      const Scores& to) {
  const char* at = reinterpret_cast<const char*>(rows);
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));  // dpbusd wants unsigned bytes
  const int64_t limb_stride = round_up(r, 16) * GB;
  __m512i sum[2 * kLimbs * GB];
  unroll<2 * kLimbs * GB>([&](auto i) LOKI_INLINE { sum[i] = _mm512_setzero_si512(); });
  const int8_t* limbs = q.limb;
  for (int64_t done = 0; done < r; done += 16, limbs += 16 * GB) {
    __m512i column[2][4];
    load_columns(at + done, stride, chunk_bytes(r - done), column[0]);
    load_columns(at + 16 * stride + done, stride, chunk_bytes(r - done), column[1]);
    unroll<4>([&](auto c) LOKI_INLINE {
      __m512i low_rows = _mm512_xor_si512(column[0][c], flip);
      __m512i high_rows = _mm512_xor_si512(column[1][c], flip);
      unroll<kLimbs * GB>([&](auto i) LOKI_INLINE {
        int32_t weight;
        std::memcpy(&weight, limbs + i / GB * limb_stride + 4 * (c * GB + i % GB), 4);
        __m512i weights = _mm512_set1_epi32(weight);
        sum[i] = _mm512_dpbusd_epi32(sum[i], low_rows, weights);
        sum[kLimbs * GB + i] = _mm512_dpbusd_epi32(sum[kLimbs * GB + i], high_rows, weights);
      });
    });
  }
  __m512 score[2 * GB];
  unroll<2 * GB>([&](auto i) LOKI_INLINE {
    constexpr int half = i / GB, g = i % GB;
    __m512 total = _mm512_setzero_ps();
    for (int limb = kLimbs - 1; limb >= 0; --limb) {
      __m512i offset = _mm512_set1_epi32(q.offset[limb * GB + g]);
      __m512i exact = _mm512_sub_epi32(sum[(half * kLimbs + limb) * GB + g], offset);
      total = _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(exact));
    }
    __m512 row_scale = _mm512_loadu_ps(to.row_scale + 16 * half);
    score[i] = _mm512_mul_ps(total, _mm512_mul_ps(row_scale, _mm512_set1_ps(q.step[g])));
  });
  put_scores<GB>(score, to);
}
#endif

template <class E>
void score_floats(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  switch (q.heads) {
    case 1: return score_block<E, 1>(rows, stride, r, q.value, to);
    case 2: return score_block<E, 2>(rows, stride, r, q.value, to);
    case 4: return score_block<E, 4>(rows, stride, r, q.value, to);
    default: return score_block<E, 8>(rows, stride, r, q.value, to);
  }
}

template <class E>
void score_heads(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  score_floats(rows, stride, r, q, to);
}
#if LOKI_VNNI
template <>
void score_heads<int8_t>(const int8_t* rows, int64_t stride, int64_t r, const Query& q,
                         const Scores& to) {
  if (!q.fixed_point) return score_floats(rows, stride, r, q, to);
  switch (q.heads) {
    case 1: return score_block_int8<1>(rows, stride, r, q, to);
    case 2: return score_block_int8<2>(rows, stride, r, q, to);
    case 4: return score_block_int8<4>(rows, stride, r, q, to);
    default: return score_block_int8<8>(rows, stride, r, q, to);
  }
}
#endif

#else

template <class E, int GB>
void score_block(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  float score[GB * kBlock];
  for (int64_t n = 0; n < kBlock; ++n) {
    float dot[GB];
    dot_row<E, GB>(rows + n * stride, r, q.value, round_up(r, 16), dot);
    for (int g = 0; g < GB; ++g) score[g * kBlock + n] = dot[g];
  }
  for (int g = 0; g < GB; ++g) {
    float* mine = score + g * kBlock;
    if (std::is_same_v<E, int8_t>) {
      for (int64_t n = 0; n < kBlock; ++n) mine[n] *= to.row_scale[n];
    }
    if (to.each) std::memcpy(to.each + g * kBlock, mine, kBlock * sizeof(float));
    if (!to.best) continue;
    // NaN compares as false and leaves the best as it is.
    for (int64_t n = 0; n < kBlock; ++n) to.best[n] = mine[n] > to.best[n] ? mine[n] : to.best[n];
  }
}

template <class E>
void score_heads(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  switch (q.heads) {
    case 1: return score_block<E, 1>(rows, stride, r, q, to);
    case 2: return score_block<E, 2>(rows, stride, r, q, to);
    case 4: return score_block<E, 4>(rows, stride, r, q, to);
    default: return score_block<E, 8>(rows, stride, r, q, to);
  }
}

#endif

// Integers that order as the floats do. NaN orders as -inf, -0 as 0.
inline int32_t ordered_key(float x) {
  x = x == x ? x + 0.0f : -kInf;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Keys of a whole block, of which the mask knows the first n positions.
void store_keys(const float* score, const MaskRow& mask, const RowPlan& row, int64_t t, int64_t n,
                int32_t* key) {
  if (!row.holes && !mask.additive()) {
    for (int64_t i = 0; i < kBlock; ++i) key[i] = ordered_key(score[i]);
    return;
  }
  float least = mask.dtype == kBool ? -1.0f : hidden_below(mask.dtype);
  float bias[kBlock] = {};
  for (int64_t i = 0; i < n; ++i) bias[i] = mask.bias(t + i);
  for (int64_t i = 0; i < kBlock; ++i) {
    key[i] = bias[i] > least ? ordered_key(score[i] + bias[i]) : kHidden;
  }
}

// ---- threshold ------------------------------------------------------------------------------

int64_t count_from(const int32_t* key, int64_t n, int32_t least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += key[i] >= least;
  return count;
}

// m-th largest of n keys, 1 <= m <= n, by bisection: 32 counting passes whatever the keys are.
int32_t bisect(const int32_t* key, int64_t n, int64_t m) {
  int64_t low = std::numeric_limits<int32_t>::min();  // count_from(low) >= m
  int64_t high = static_cast<int64_t>(std::numeric_limits<int32_t>::max()) + 1;  // count < m
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    (count_from(key, n, static_cast<int32_t>(middle)) >= m ? low : high) = middle;
  }
  return static_cast<int32_t>(low);
}

// Two keys between which the m-th largest of n surely lies, or nearly: quantiles of a sample, four
// deviations apart on either side.
struct Bracket {
  int32_t low, high;
};

Bracket bracket(const int32_t* key, int64_t n, int64_t m) {
  constexpr int64_t kMost = 1024;
  int64_t size = n > 32768 ? kMost : kMost / 4;
  int32_t sample[kMost];
  int64_t stratum = n / size;
  uint32_t jitter = 12345;  // strided positions alone could beat against a period in the text
  for (int64_t i = 0; i < size; ++i) {
    jitter = jitter * 1664525u + 1013904223u;
    sample[i] = key[i * stratum + static_cast<int64_t>((uint64_t{jitter} * stratum) >> 32)];
  }
  double rank = static_cast<double>(m) / n * size;
  double slack = 2 + 4 * std::sqrt(rank * (1 - rank / size));
  int64_t high_rank = static_cast<int64_t>(rank - slack);
  int64_t low_rank = static_cast<int64_t>(rank + slack) + 1;
  return {low_rank > size ? kLowest : bisect(sample, size, low_rank),
          high_rank < 1 ? std::numeric_limits<int32_t>::max() : bisect(sample, size, high_rank)};
}

// Lanes of a vector that hold keys from `low` on, packed to its front.
#if LOKI_AVX512
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}
inline int64_t pack(__mmask16 keep, __m512i value, int32_t* to) {
  int64_t count = __builtin_popcount(keep);
  _mm512_mask_storeu_epi32(to, first_lanes(count), _mm512_maskz_compress_epi32(keep, value));
  return count;
}
#endif

// Copies the keys in [low, high] to `out`, in order; counts those above. May work in place.
int64_t keep_between(const int32_t* key, int64_t n, Bracket range, int32_t* out, int64_t* above) {
  int64_t kept = 0, over = 0;
#if LOKI_AVX512
  const __m512i low = _mm512_set1_epi32(range.low), high = _mm512_set1_epi32(range.high);
  for (int64_t i = 0; i < n; i += 16) {
    __m512i x = _mm512_maskz_loadu_epi32(first_lanes(n - i), key + i);
    __mmask16 big = _mm512_mask_cmpgt_epi32_mask(first_lanes(n - i), x, high);
    __mmask16 keep = _mm512_mask_cmpge_epi32_mask(first_lanes(n - i) & ~big, x, low);
    over += __builtin_popcount(big);
    kept += pack(keep, x, out + kept);
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    int32_t x = key[i];
    over += x > range.high;
    out[kept] = x;
    kept += (x >= range.low) & (x <= range.high);
  }
#endif
  *above = over;
  return kept;
}

struct Threshold {
  int32_t key;    // the m-th largest
  int64_t equal;  // how many keys that equal it are among the m largest
};

constexpr int64_t kFew = 2048;  // keys that bisection alone is quick for

// The m-th largest of n keys, 1 <= m <= n: brackets it, keeps what lies between, and repeats;
// bisects what is small, and whatever a bracket fails to narrow. `room` holds n keys.
Threshold find_threshold(const int32_t* key, int64_t n, int64_t m, int32_t* room) {
  while (n > kFew) {
    int64_t above;
    int64_t kept = keep_between(key, n, bracket(key, n, m), room, &above);
    if (m <= above || m > above + kept || kept > n / 2) break;
    key = room;
    n = kept;
    m -= above;
  }
  int32_t threshold = bisect(key, n, m);
  return {threshold, m - count_from(key, n, threshold + 1)};
}

// ---- compaction -----------------------------------------------------------------------------

// Some keys of a row and their positions, ascending.
struct Candidates {
  int64_t n;
  int32_t* key;
  int32_t* position;
};

// Those of positions [from, to) that are `low` or above. `room` holds twice as many.
Candidates gather(const int32_t* key, int64_t from, int64_t to, int32_t low, int32_t* room) {
  Candidates found{0, room, room + (to - from)};
  int64_t t = from;
#if LOKI_AVX512
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; t < to; t += 16) {
    __m512i x = _mm512_maskz_loadu_epi32(first_lanes(to - t), key + t);
    __mmask16 keep =
        _mm512_mask_cmpge_epi32_mask(first_lanes(to - t), x, _mm512_set1_epi32(low));
    if (!keep) continue;
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(t)), iota);
    pack(keep, position, found.position + found.n);
    found.n += pack(keep, x, found.key + found.n);
  }
#else
  for (; t < to; t += 16) {
    int64_t stop = min_of(t + 16, to);
    int32_t any = 0;
    for (int64_t i = t; i < stop; ++i) any |= key[i] >= low;
    if (!any) continue;
    for (int64_t i = t; i < stop; ++i) {
      found.key[found.n] = key[i];
      found.position[found.n] = static_cast<int32_t>(i);
      found.n += key[i] >= low;
    }
  }
#endif
  return found;
}

// Writes ascending positions into the slots of one row, never past its end.
class SlotWriter {
 public:
  SlotWriter(int32_t* slots, int64_t size) : slots_(slots), size_(size) {}

  // Positions [from, to) that are visible.
  void put_visible(int64_t from, int64_t to, const MaskRow& mask, bool holes) {
    for (int64_t t = from; t < to && used_ < size_; ++t) {
      if (!holes || visible(mask, t)) slots_[used_++] = static_cast<int32_t>(t);
    }
  }

  // Candidates above the threshold, and the first of those that equal it.
  void put_best(const Candidates& from, Threshold threshold) {
    int64_t i = 0;
#if LOKI_AVX512
    const __m512i limit = _mm512_set1_epi32(threshold.key);
    for (; i + 16 <= from.n && used_ + 16 <= size_; i += 16) {
      __m512i x = _mm512_loadu_si512(from.key + i);
      unsigned keep = _mm512_cmpgt_epi32_mask(x, limit);
      unsigned equal = _mm512_cmpeq_epi32_mask(x, limit);
      for (; equal && threshold.equal > 0; equal &= equal - 1, --threshold.equal) {
        keep |= equal & (~equal + 1);
      }
      used_ += pack(static_cast<__mmask16>(keep), _mm512_loadu_si512(from.position + i),
                    slots_ + used_);
    }
#endif
    for (; i < from.n && used_ < size_; ++i) {
      int32_t key = from.key[i];
      bool keep = key > threshold.key || (key == threshold.key && threshold.equal-- > 0);
      slots_[used_] = from.position[i];
      used_ += keep;
    }
  }

  void finish() {
    for (; used_ < size_; ++used_) slots_[used_] = -1;
  }

 private:
  int32_t* slots_;
  int64_t size_;
  int64_t used_ = 0;
};

// ---- the op ---------------------------------------------------------------------------------

class Select {
 public:
  explicit Select(const SelectParams& p)
      : p_(p),
        hq_(p.q.size[1]), s_(p.q.size[2]), d_(p.q.size[3]),
        hkv_(p.index.size[1]), t_(p.index.size[2]), r_(p.index.size[3]),
        group_(hq_ / hkv_), heads_(p.per_head ? hq_ : hkv_),
        pairs_(p.q.size[0] * hkv_), rows_(p.q.size[0] * heads_ * s_),
        columns_(round_up(r_, 16)), key_stride_(round_up(t_, 16) + kBlock) {}

  // Bytes of scratch that could not be had, then nothing is written; else 0.
  int64_t run() {
    int64_t bytes = pairs_ * t_ * r_ * p_.index.element_size();
    int threads = static_cast<int>(min_of(p_.threads, bytes / kBytesPerThread + 1));
    int64_t pairs_at_once =
        min_of(max_of<int64_t>(kMaxKeys / (rows_per_pair() * key_stride_), 1), pairs_);
    if (int64_t missing = allocate(threads, pairs_at_once)) return missing;
    plan();
    for (int64_t first = 0; first < pairs_; first += pairs_at_once) {
      take(first, min_of(first + pairs_at_once, pairs_), threads);
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
  void take(int64_t first, int64_t stop, int threads) {
    first_row_ = first * rows_per_pair();
    int64_t first_tile = spans_[first].first_tile, tiles = spans_[stop].first_tile - first_tile;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
      char* room = rooms_ + me * room_bytes_;
      score_tiles(first_tile + tiles * me / all, first_tile + tiles * (me + 1) / all, room);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = first_row_; row < stop * rows_per_pair(); ++row) {
        emit(row, reinterpret_cast<int32_t*>(room));
      }
    }
  }

  int32_t* keys_of(int64_t row) const { return keys_ + (row - first_row_) * key_stride_; }

  // As `run` in what it returns.
  int64_t allocate(int threads, int64_t pairs_at_once) {
    thread_local Scratch scratch;
    int64_t padded_heads = round_up(group_, 8);
    int64_t per_token = padded_heads * (columns_ * (4 + kLimbs) + 4 * (kLimbs + 1));
    int64_t query_bytes = s_ * group_ * sizeof(Query) + s_ * per_token;
    room_bytes_ = round_up(max_of(query_bytes + tail_bytes(), 3 * key_stride_ * 4), 64);
    int64_t plan_bytes = round_up(rows_ * sizeof(RowPlan), 64);
    int64_t span_bytes = round_up((pairs_ + 1) * sizeof(Span), 64);
    int64_t key_bytes = pairs_at_once * rows_per_pair() * key_stride_ * 4;
    int64_t wanted = plan_bytes + span_bytes + threads * room_bytes_ + key_bytes;
    char* at = static_cast<char*>(scratch.reserve(wanted));
    if (!at) return wanted;
    plans_ = reinterpret_cast<RowPlan*>(at);
    spans_ = reinterpret_cast<Span*>(at += plan_bytes);
    rooms_ = at += span_bytes;
    keys_ = reinterpret_cast<int32_t*>(at + threads * room_bytes_);
    return 0;
  }

  void plan() {
    for (int64_t row = 0; row < rows_; ++row) {
      plans_[row] = plan_row(p_, mask_of(row), batch_of(row), head_of(row), token_of(row));
    }
    int64_t tiles = 0;
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      Span span{t_, 0, tiles};
      for (int64_t n = 0; n < rows_per_pair(); ++n) {
        const RowPlan& row = plans_[pair * rows_per_pair() + n];
        if (!row.scored()) continue;
        span.from = min_of(span.from, row.first);
        span.to = max_of(span.to, row.last);
      }
      if (span.to > span.from) tiles += (span.to - span.from + kTile - 1) / kTile;
      spans_[pair] = span;
    }
    spans_[pairs_] = Span{0, 0, tiles};
  }

  void score_tiles(int64_t tile, int64_t stop, char* room) {
    for (int64_t pair = 0; tile < stop; ++pair) {
      const Span& span = spans_[pair];
      int64_t pair_stop = min_of(stop, spans_[pair + 1].first_tile);
      if (pair_stop <= tile) continue;
      int64_t from = span.from + (tile - span.first_tile) * kTile;
      int64_t to = min_of(span.from + (pair_stop - span.first_tile) * kTile, span.to);
      int64_t blocks = project(pair, room);
      const Query* queries = reinterpret_cast<const Query*>(room);
      switch (p_.index.dtype) {
        case kBFloat16: score_span<BFloat16>(pair, from, to, queries, blocks, room); break;
        case kFloat16: score_span<Float16>(pair, from, to, queries, blocks, room); break;
        case kFloat32: score_span<float>(pair, from, to, queries, blocks, room); break;
        default: score_span<int8_t>(pair, from, to, queries, blocks, room);
      }
      tile = pair_stop;
    }
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
        query->fixed_point = LOKI_VNNI && p_.index.dtype == kInt8;
        for (int64_t x = 0; x < heads; ++x) {
          project_head(pair, min_of(g + x, group_ - 1), s, x, query);
          if (query->fixed_point) fix_point(x, query);
        }
        ++query;
      }
    }
    return blocks;
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
        query->value[query_slot(query->heads, x, r0 + r, r_)] = low[r] * static_cast<float>(p_.scale);
      }
    }
  }

  void fix_point(int64_t x, Query* query) const {
    float most = 0;
    bool finite = true;
    for (int64_t r = 0; r < r_; ++r) {
      float size = std::fabs(query->value[query_slot(query->heads, x, r, r_)]);
      finite &= size < kInf;
      most = max_of(most, size);
    }
    float step = most / kMaxFixed;
    query->step[x] = step;
    query->fixed_point = finite && (most == 0 || step > std::numeric_limits<float>::min());
    if (!query->fixed_point) return;
    int32_t sum[kLimbs] = {};
    for (int64_t r = 0; r < columns_; ++r) {
      float value = query->value[query_slot(query->heads, x, r, r_)];
      int64_t fixed = most == 0 ? 0 : std::llrint(value / step);
      fixed = max_of<int64_t>(min_of<int64_t>(fixed, kMaxFixed), -kMaxFixed);
      for (int limb = 0; limb < kLimbs; ++limb) {
        int8_t byte = static_cast<int8_t>(fixed & 0xff);
        fixed = (fixed - byte) >> 8;
        sum[limb] += byte;
        query->limb[((limb * columns_ / 4 + r / 4) * query->heads + x) * 4 + r % 4] = byte;
      }
    }
    for (int limb = 0; limb < kLimbs; ++limb) {
      query->offset[limb * query->heads + x] = 128 * sum[limb];
    }
  }

  template <class E>
  void score_span(int64_t pair, int64_t from, int64_t to, const Query* queries, int64_t blocks,
                  char* room) {
    const E* index = p_.index.row<E>(pair / hkv_, pair % hkv_, 0);
    const float* scales = p_.index_scale.row<float>(pair / hkv_, pair % hkv_, 0);
    float row_scale[kBlock] = {};
    for (int64_t t = from; t < to; t += kBlock) {
      int64_t n = min_of(kBlock, to - t);
      int64_t stride = p_.index.stride[2];
      const E* rows = index + t * stride;
      fetch(rows + kAhead * stride, stride * sizeof(E), r_ * sizeof(E));
      if (p_.index.dtype == kInt8) {
        int64_t scale_stride = p_.index_scale.stride[2];
        fetch(scales + (t + kAhead) * scale_stride, scale_stride * 4, 4);
        for (int64_t i = 0; i < n; ++i) row_scale[i] = scales[(t + i) * scale_stride];
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
        score_token(pair, s, t, n, queries + s * blocks, blocks, rows, stride, row_scale);
      }
    }
  }

  // One block of rows into the cache. Left to itself the hardware keeps up with a seventh of the
  // memory's speed here.
  static void fetch(const void* rows, int64_t stride_bytes, int64_t row_bytes) {
    const char* row = static_cast<const char*>(rows);
    int64_t rows_per_line = max_of<int64_t>(64 / max_of<int64_t>(stride_bytes, 1), 1);
    for (int64_t n = 0; n < kBlock; n += rows_per_line) {
      for (int64_t done = 0; done < row_bytes; done += 64) {
        __builtin_prefetch(row + n * stride_bytes + done);
      }
    }
  }

  template <class E>
  void score_token(int64_t pair, int64_t s, int64_t t, int64_t n, const Query* queries,
                   int64_t blocks, const E* rows, int64_t stride, const float* row_scale) {
    float best[kBlock], each[8 * kBlock];
    for (int64_t i = 0; i < kBlock; ++i) best[i] = -kInf;
    const Scores to{p_.per_head ? nullptr : best, p_.per_head ? each : nullptr, row_scale};
    for (const Query* query = queries; query < queries + blocks; ++query) {
      score_heads(rows, stride, r_, *query, to);
      if (!p_.per_head) continue;
      for (int64_t x = 0; x < min_of(query->heads, group_ - query->first_head); ++x) {
        store_row(row_of(pair, query->first_head + x, s), t, n, each + x * kBlock);
      }
    }
    if (!p_.per_head) store_row(row_of(pair, 0, s), t, n, best);
  }

  void store_row(int64_t row, int64_t t, int64_t n, const float* score) {
    const RowPlan& plan = plans_[row];
    if (!plan.scored() || t + n <= plan.first || t >= plan.last) return;
    store_keys(score, mask_of(row), plan, t, n, keys_of(row) + t);
  }

  void put_best(const RowPlan& plan, const int32_t* key, int32_t* room, SlotWriter* slots) const {
    int64_t n = plan.last - plan.first;
    int64_t take = min_of(plan.take, n);
    int32_t low = n > kFew ? bracket(key + plan.first, n, take).low : kLowest;
    Candidates found = gather(key, plan.first, plan.last, max_of(low, kLowest), room);
    if (found.n < take) found = gather(key, plan.first, plan.last, kLowest, room);
    take = min_of(take, found.n);
    if (take > 0) slots->put_best(found, find_threshold(found.key, found.n, take, room + 2 * n));
  }

  void emit(int64_t row, int32_t* room) const {
    const RowPlan& plan = plans_[row];
    const MaskRow mask = mask_of(row);
    SlotWriter slots(p_.positions + row * p_.slots, p_.slots);
    slots.put_visible(plan.start, plan.first, mask, plan.holes);
    if (plan.scored()) {
      put_best(plan, keys_of(row), room, &slots);
    } else if (plan.take > 0) {
      slots.put_visible(plan.first, plan.last, mask, plan.holes);
    }
    slots.put_visible(plan.last, plan.end, mask, plan.holes);
    slots.finish();
  }

  int64_t tail_bytes() const { return round_up(kBlock * r_ * 4, 64); }

  const SelectParams& p_;
  const int64_t hq_, s_, d_, hkv_, t_, r_, group_, heads_, pairs_, rows_, columns_, key_stride_;
  int64_t room_bytes_ = 0, first_row_ = 0;
  RowPlan* plans_ = nullptr;
  Span* spans_ = nullptr;
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
