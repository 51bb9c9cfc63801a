// The largest of a row's keys, on the CPU: integers that order as the scores do. A sample of them
// bounds the threshold from below, one pass picks the candidates from there up, and counting passes
// over these few find it. Nothing is sorted.
#pragma once

#include "cpu_score.h"

namespace loki {

constexpr int32_t kLowest = kHidden + 1;  // at or below the key of -inf

// ---- threshold ------------------------------------------------------------------------------

inline int64_t count_from(const int32_t* key, int64_t n, int32_t least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += key[i] >= least;
  return count;
}

// m-th largest of n keys, 1 <= m <= n, by bisection: 32 counting passes whatever the keys are.
inline int32_t bisect(const int32_t* key, int64_t n, int64_t m) {
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

inline Bracket bracket(const int32_t* key, int64_t n, int64_t m) {
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
inline int64_t keep_between(const int32_t* key, int64_t n, Bracket range, int32_t* out, int64_t* above) {
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
inline Threshold find_threshold(const int32_t* key, int64_t n, int64_t m, int32_t* room) {
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

// ---- weights --------------------------------------------------------------------------------

// exp(score - most) of a key; 0 of one that is hidden or infinite.
inline float weight_of(int32_t key, float most) {
  float x = score_of(key);
  return x < kInf ? exp_of(x - most) : 0.0f;
}

// What keys from `least` on weigh, and how many they are.
struct Heap {
  float weight = 0;
  int64_t count = 0;
};

inline Heap heap_from(const int32_t* key, const float* weight, int64_t n, int32_t least) {
  float sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; ++i) {
    sum += key[i] >= least ? weight[i] : 0.0f;
    count += key[i] >= least;
  }
  return {sum, count};
}

// The fewest of n keys, the largest, whose weights add up to `need` > 0, by bisection; keys that
// are decided drop out of both arrays. All n where they do not weigh as much.
inline Threshold lightest(int32_t* key, float* weight, int64_t n, float need, int64_t* chosen) {
  int64_t low = std::numeric_limits<int32_t>::max(), high = kLowest;
  for (int64_t i = 0; i < n; ++i) {
    low = min_of<int64_t>(low, key[i]);
    high = max_of<int64_t>(high, int64_t{key[i]} + 1);
  }
  Heap over;  // keys from `high` on
  while (high - low > 1) {
    int32_t middle = static_cast<int32_t>(low + (high - low) / 2);
    Heap more = heap_from(key, weight, n, middle);
    bool enough = over.weight + more.weight >= need;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      int32_t k = key[i];
      float w = weight[i];
      key[kept] = k;
      weight[kept] = w;
      kept += (k >= middle) == enough;
    }
    n = kept;
    if (!enough) over.weight += more.weight, over.count += more.count;
    (enough ? low : high) = middle;
  }
  int64_t equal = 0;  // of those that are left, all at `low`
  for (float sum = over.weight; equal < n && sum < need; ++equal) sum = over.weight + (equal + 1) * weight[0];
  *chosen = over.count + equal;
  return {static_cast<int32_t>(low), equal};
}

// ---- compaction -----------------------------------------------------------------------------

// Some keys of a row and their positions, ascending.
struct Candidates {
  int64_t n;
  int32_t* key;
  int32_t* position;
};

// Those of positions [from, to) that are `low` or above. `room` holds twice as many.
inline Candidates gather(const int32_t* key, int64_t from, int64_t to, int32_t low, int32_t* room) {
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

}  // namespace loki
