// What `loki::select` ranks by, on the CPU: an index of few dims, one row per lane; keys and pages,
// one row after the other (cpu_rows.h); and the sum of a group's probabilities.
#pragma once

#include "cpu_rows.h"

namespace loki {

constexpr int32_t kHidden = std::numeric_limits<int32_t>::min();
constexpr int64_t kBlock = 32;  // positions scored at once

// The middle [first, last) of a row competes for `take` slots; what is visible before and behind
// it is kept. `count` keys are visible. `weighed`: how much they weigh is asked for.
struct RowPlan {
  int64_t start, end, first, last, middle, take, count;
  bool holes;  // some keys in [start, end) are hidden
  bool weighed;

  bool scored() const { return weighed || (take > 0 && take < middle); }
};

inline float hidden_below(int64_t dtype) {
  switch (dtype) {
    case kFloat16: return -65504.0f / 2;
    case kBFloat16: return -3.3895313892515355e38f / 2;
    default: return -std::numeric_limits<float>::max() / 2;
  }
}

inline bool visible(const MaskRow& mask, int64_t t) {
  return mask.bias(t) > (mask.dtype == kBool ? -1.0f : hidden_below(mask.dtype));
}

// ---- an index of few dims -------------------------------------------------------------------

// Where dim r of a query head lies among `heads` of them: side by side for a kernel that scores
// rows in lanes, head after head for one that leaves vectors to the compiler.
inline int64_t column_slot(int64_t heads, int64_t g, int64_t r, [[maybe_unused]] int64_t ranks) {
  return LOKI_AVX512 || LOKI_AVX2 ? r * heads + g : g * round_up(ranks, 16) + r;
}

// One block of query heads. In index space, times the scale: value[column_slot].
// An int8 index is met in fixed point, q = step * (limb 0 + 256 * limb 1), limbs being signed
// bytes, so that q is known to 2**-16 of its largest value, the index itself to 2**-8: as
// `put_fixed` has it.
// Keys and pages are met without the scale, as `query_slot` of cpu_rows.h has it, maybe in bf16.
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
// Whether sums of 32 bits hold the products of r dims of an int8 index: any of them with a limb, 512
// with numbers of 16 bits.
inline bool fits_fixed_point([[maybe_unused]] int64_t r) {
  return LOKI_VNNI || LOKI_SDOT || (LOKI_INT8_DOTS && r <= 512);
}

// Puts dim r of a head, and adds its limbs to their sums. Where rows lie in lanes, limbs of four dims
// lie together, limb after limb: limb[((limb * columns / 4 + r / 4) * heads + head) * 4 + r % 4]; with
// AVX2 numbers of 16 bits, of two even dims or of two odd ones. Else head after head (cpu_lanes.h).
inline void put_fixed(int64_t fixed, int64_t columns, int64_t r, int64_t head, int32_t* sum,
                      Query* query) {
#if LOKI_VNNI || LOKI_SDOT
  for (int64_t limb = 0; limb < kLimbs; ++limb) {
    int8_t byte = static_cast<int8_t>(fixed & 0xff);
    fixed = (fixed - byte) >> 8;
    sum[limb] += byte;
    int64_t slot = LOKI_VNNI ? ((limb * columns / 4 + r / 4) * query->heads + head) * 4 + r % 4
                             : (head * kLimbs + limb) * columns + r;
    query->limb[slot] = byte;
  }
#else
  int16_t whole = static_cast<int16_t>(fixed);
  int64_t slot = LOKI_AVX2 ? ((r / 4 * 2 + r % 2) * query->heads + head) * 2 + r % 4 / 2
                           : head * columns + r;
  std::memcpy(query->limb + 2 * slot, &whole, sizeof(whole));
#endif
}

// What a kernel does with the dots of a block of rows: `best` of kBlock keeps the highest over the
// heads, NaN left aside; or `each` of heads * kBlock takes them as they are. An int8 index
// multiplies them by row_scale. `ahead`: a block of rows without gaps to fetch meanwhile, or null.
struct Scores {
  float* best;
  float* each;
  const float* row_scale;
  const char* ahead;
};

// For a kernel that takes 16 bytes of each of Rows rows in turn: fetches as much of those ahead, or
// nothing where they are null. All lines at once would fill what keeps track of them, and wait: half
// as fast.
template <int Rows>
LOKI_INLINE inline void fetch_ahead(const char* rows, int64_t done) {
  if (!rows) return;
  for (int64_t i = 0; i < 16 * Rows; i += 64) __builtin_prefetch(rows + done * Rows + i);
}

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
inline __m512 unpack_column(__m512i column, E) {
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
    fetch_ahead<kBlock>(to.ahead, done);
    load_columns(at + done, stride_bytes, bytes, column[0]);
    load_columns(at + 16 * stride_bytes + done, stride_bytes, bytes, column[1]);
    unroll<4 * kPerColumn<E>>([&](auto i) LOKI_INLINE {
      constexpr int c = i / kPerColumn<E>, e = i % kPerColumn<E>;
      __m512 low_rows = unpack_column<e>(column[0][c], E{}), high_rows = unpack_column<e>(column[1][c], E{});
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
    fetch_ahead<kBlock>(to.ahead, done);
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

#elif LOKI_AVX2

// Blocks of eight rows that are scored together.
template <int GB>
constexpr int kGroups = GB <= 2 ? 2 : 1;

// Dword c of the 16 bytes at `at` of 8 rows -> column[c], one row per lane.
LOKI_INLINE inline void load_columns(const char* at, int64_t stride_bytes, __m256i* column) {
  __m256i part[4];
  unroll<4>([&](auto i) LOKI_INLINE {
    auto load = [&](int row) LOKI_INLINE {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + row * stride_bytes));
    };
    part[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 4), 1);
  });
  __m256i low01 = _mm256_unpacklo_epi32(part[0], part[1]);
  __m256i high01 = _mm256_unpackhi_epi32(part[0], part[1]);
  __m256i low23 = _mm256_unpacklo_epi32(part[2], part[3]);
  __m256i high23 = _mm256_unpackhi_epi32(part[2], part[3]);
  column[0] = _mm256_unpacklo_epi64(low01, low23);
  column[1] = _mm256_unpackhi_epi64(low01, low23);
  column[2] = _mm256_unpacklo_epi64(high01, high23);
  column[3] = _mm256_unpackhi_epi64(high01, high23);
}

// f(column[group][4]) for each 16 bytes of 8 * Groups rows, from row n of a block on; zeros lie behind
// a row's last.
template <int Groups, class F>
LOKI_INLINE inline void for_columns(const char* at, int64_t stride_bytes, int64_t row_bytes,
                                    int64_t n, const Scores& to, F&& f) {
  at += n * stride_bytes;
  const char* ahead = to.ahead ? to.ahead + n * row_bytes : nullptr;
  for (int64_t done = 0; done < row_bytes; done += 16) {
    __m256i column[Groups][4];
    fetch_ahead<8 * Groups>(ahead, done);
    if (done + 16 <= row_bytes) {
      unroll<Groups>([&](auto i) LOKI_INLINE {
        load_columns(at + 8 * i * stride_bytes + done, stride_bytes, column[i]);
      });
    } else {
      char padded[Groups * 128] = {};
      for (int i = 0; i < 8 * Groups; ++i) {
        std::memcpy(padded + 16 * i, at + i * stride_bytes + done, row_bytes - done);
      }
      unroll<Groups>([&](auto i) LOKI_INLINE { load_columns(padded + 128 * i, 16, column[i]); });
    }
    f(column);
  }
}

// Value i of those packed in one column, for 8 rows.
template <class E>
constexpr int kPerColumn = 4 / sizeof(E);
template <int i, class E>
LOKI_INLINE inline __m256 unpack_column(__m256i column, E) {
  if constexpr (std::is_same_v<E, float>) {
    return _mm256_castsi256_ps(column);
  } else if constexpr (std::is_same_v<E, int8_t>) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(column, 24 - 8 * i), 24));
  } else if constexpr (std::is_same_v<E, Float16>) {
    __m256i half = i == 0 ? _mm256_and_si256(column, _mm256_set1_epi32(0xffff))
                          : _mm256_srli_epi32(column, 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  } else if constexpr (i == 0) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(column, 16));
  } else {
    __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(column, high));
  }
}

// sum[group * GB + head] of 8 rows each, from row n of the block on.
template <int GB>
LOKI_INLINE inline void put_scores(const __m256* sum, int64_t n, const Scores& to) {
  unroll<kGroups<GB>>([&](auto i) LOKI_INLINE {
    if (to.best) {
      __m256 best = _mm256_loadu_ps(to.best + n + 8 * i);
      // Of two operands, one of them NaN, max_ps returns the second.
      unroll<GB>([&](auto g) LOKI_INLINE { best = _mm256_max_ps(sum[i * GB + g], best); });
      _mm256_storeu_ps(to.best + n + 8 * i, best);
    } else {
      unroll<GB>([&](auto g) LOKI_INLINE {
        _mm256_storeu_ps(to.each + g * kBlock + n + 8 * i, sum[i * GB + g]);
      });
    }
  });
}

template <class E, int GB>
void score_block(const E* rows, int64_t stride, int64_t r, const Query& query, const Scores& to) {
  constexpr int kSets = kGroups<GB>;
  const char* at = reinterpret_cast<const char*>(rows);
  const int64_t stride_bytes = stride * sizeof(E);
  for (int64_t n = 0; n < kBlock; n += 8 * kSets) {
    const float* q = query.value;
    __m256 sum[kSets * GB] = {};
    if constexpr (GB == 1 && sizeof(E) > 1) {  // too few products to be worth turning rows
      const char* ahead = to.ahead ? to.ahead + n * r * sizeof(E) : nullptr;
      for (int64_t i = 0; i < r * sizeof(E); i += 16) fetch_ahead<8 * kSets>(ahead, i);
      unroll<kSets>([&](auto set) LOKI_INLINE {
        const E* row[8];
        for (int i = 0; i < 8; ++i) row[i] = rows + (n + 8 * set + i) * stride;
        float dot[8];
        dot_rows<E, float, 1>(row, nullptr, r, q, 0, dot);
        sum[set] = _mm256_loadu_ps(dot);
      });
      put_scores<GB>(sum, n, to);
      continue;
    }
    for_columns<kSets>(at, stride_bytes, r * sizeof(E), n, to, [&](auto& column) LOKI_INLINE {
      unroll<4 * kPerColumn<E>>([&](auto i) LOKI_INLINE {
        constexpr int c = i / kPerColumn<E>, e = i % kPerColumn<E>;
        unroll<kSets>([&](auto set) LOKI_INLINE {
          __m256 value = unpack_column<e>(column[set][c], E{});
          unroll<GB>([&](auto g) LOKI_INLINE {
            __m256 weight = _mm256_broadcast_ss(q + i * GB + g);
            sum[set * GB + g] = _mm256_fmadd_ps(value, weight, sum[set * GB + g]);
          });
        });
      });
      q += 4 * kPerColumn<E> * GB;
    });
    if constexpr (std::is_same_v<E, int8_t>) {
      unroll<kSets * GB>([&](auto i) LOKI_INLINE {
        sum[i] = _mm256_mul_ps(sum[i], _mm256_loadu_ps(to.row_scale + n + i / GB * 8));
      });
    }
    put_scores<GB>(sum, n, to);
  }
}

// int8 rows against the fixed-point query.
template <int GB>
void score_block_int8(const int8_t* rows, int64_t stride, int64_t r, const Query& query,
                      const Scores& to) {
  constexpr int kSets = kGroups<GB>;
  const char* at = reinterpret_cast<const char*>(rows);
  for (int64_t n = 0; n < kBlock; n += 8 * kSets) {
    const int8_t* weights = query.limb;
    __m256i sum[kSets * GB] = {};
    for_columns<kSets>(at, stride, r, n, to, [&](auto& column) LOKI_INLINE {
      unroll<8>([&](auto i) LOKI_INLINE {
        unroll<kSets>([&](auto set) LOKI_INLINE {
          __m256i bytes = column[set][i / 2];  // of even dims first
          if (i % 2 == 0) bytes = _mm256_slli_epi16(bytes, 8);
          __m256i value = _mm256_srai_epi16(bytes, 8);
          unroll<GB>([&](auto g) LOKI_INLINE {
            int32_t weight;
            std::memcpy(&weight, weights + 4 * (i * GB + g), 4);
            __m256i products = _mm256_madd_epi16(value, _mm256_set1_epi32(weight));
            sum[set * GB + g] = _mm256_add_epi32(sum[set * GB + g], products);
          });
        });
      });
      weights += 32 * GB;
    });
    __m256 score[kSets * GB];
    unroll<kSets * GB>([&](auto i) LOKI_INLINE {
      __m256 row_scale = _mm256_loadu_ps(to.row_scale + n + i / GB * 8);
      __m256 step = _mm256_mul_ps(row_scale, _mm256_set1_ps(query.step[i % GB]));
      score[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i]), step);
    });
    put_scores<GB>(score, n, to);
  }
}

#else

// score[head * kBlock + row], times the scale of a row of an int8 index.
template <int GB>
inline void put_scores(float* score, bool scaled, const Scores& to) {
  for (int g = 0; g < GB; ++g) {
    float* mine = score + g * kBlock;
    if (scaled) {
      for (int64_t n = 0; n < kBlock; ++n) mine[n] *= to.row_scale[n];
    }
    if (to.each) std::memcpy(to.each + g * kBlock, mine, kBlock * sizeof(float));
    if (!to.best) continue;
    // NaN compares as false and leaves the best as it is.
    for (int64_t n = 0; n < kBlock; ++n) to.best[n] = mine[n] > to.best[n] ? mine[n] : to.best[n];
  }
}

template <class E, int GB>
void score_block(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  constexpr int kRows = kRowsOf<GB>;
  float score[GB * kBlock], dot[kRows * GB];
  for (int64_t n = 0; n < kBlock; n += kRows) {
    const E* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows + (n + i) * stride;
    dot_rows<E, float, GB>(row, nullptr, r, q.value, round_up(r, 16), dot);
    for (int i = 0; i < kRows * GB; ++i) score[i % GB * kBlock + n + i / GB] = dot[i];
  }
  put_scores<GB>(score, std::is_same_v<E, int8_t>, to);
}

#if LOKI_INT8_DOTS
// int8 rows against the fixed-point query.
template <int GB>
void score_block_int8(const int8_t* rows, int64_t stride, int64_t r, const Query& q,
                      const Scores& to) {
  constexpr int kRows = kIntRowsOf<GB>;
  float score[GB * kBlock], dot[kRows * GB];
  for (int64_t n = 0; n < kBlock; n += kRows) {
    const int8_t* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows + (n + i) * stride;
    dot_int_rows<GB>(row, r, q.limb, round_up(r, 16), dot);
    for (int i = 0; i < kRows * GB; ++i) {
      score[i % GB * kBlock + n + i / GB] = dot[i] * q.step[i % GB];
    }
  }
  put_scores<GB>(score, true, to);
}
#endif

#endif

#if !LOKI_AVX512
template <class E>
void score_floats(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  switch (q.heads) {
    case 1: return score_block<E, 1>(rows, stride, r, q, to);
    case 2: return score_block<E, 2>(rows, stride, r, q, to);
    case 4: return score_block<E, 4>(rows, stride, r, q, to);
    default: return score_block<E, 8>(rows, stride, r, q, to);
  }
}
#endif

template <class E>
void score_heads(const E* rows, int64_t stride, int64_t r, const Query& q, const Scores& to) {
  score_floats(rows, stride, r, q, to);
}
#if LOKI_INT8_DOTS
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

// ---- keys and pages, rows of many dims ------------------------------------------------------

constexpr int64_t kTile = 512;                 // positions per unit of work, a multiple of kBlock
constexpr int64_t kTileRows = kTile + kBlock;  // the most rows of keys or pages that it meets
constexpr int64_t kRowsAhead = 64;             // rows fetched ahead of the ones being scored

// score[head * kTileRows + i] = scale * (q . row i) for n rows, n > 0; rows of E, queries of Q.
template <class E, class Q, int GB>
void score_rows(const void* rows, int64_t stride, int64_t n, const void* queries, int64_t d,
                float scale, float* score) {
  const E* first_row = static_cast<const E*>(rows);
  const Q* q = static_cast<const Q*>(queries);
#if LOKI_AVX512
  constexpr int kRows = 16 / GB;
  for (int64_t first = 0; first < n; first += kRows) {
    const E *row[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = first_row + min_of(first + i, n - 1) * stride;
      ahead[i] = row[i] + kRowsAhead * stride;
    }
    float dot[16], by_head[16];
    __m512 scaled = _mm512_mul_ps(dot_rows<E, Q, GB>(row, ahead, q, d), _mm512_set1_ps(scale));
    _mm512_storeu_ps(dot, scaled);
    unroll<16>([&](auto l) LOKI_INLINE { by_head[l % GB * kRows + l / GB] = dot[l]; });
    unroll<GB>([&](auto g) LOKI_INLINE {
      std::memcpy(score + g * kTileRows + first, by_head + g * kRows, kRows * sizeof(float));
    });
  }
#else
  constexpr int kRows = kRowsOf<GB>;
  for (int64_t first = 0; first < n; first += kRows) {
    const E *row[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = first_row + min_of(first + i, n - 1) * stride;
      ahead[i] = row[i] + kRowsAhead * stride;
    }
    float dot[kRows * GB];
    dot_rows<E, Q, GB>(row, ahead, d, q, round_up(d, 32), dot);
    for (int i = 0; i < kRows * GB; ++i) score[i % GB * kTileRows + first + i / GB] = dot[i] * scale;
  }
#endif
}

// `score_rows` of one type of rows and of queries, for 1, 2, 4 and 8 heads.
using ScoreRows = void (*)(const void*, int64_t, int64_t, const void*, int64_t, float, float*);

inline const ScoreRows* score_rows_of(int64_t row_dtype, int64_t q_dtype) {
  const ScoreRows* found = nullptr;
  with_row_types(row_dtype, q_dtype, [&](auto row, auto query) {
    using E = decltype(row);
    using Q = decltype(query);
    static constexpr ScoreRows all[] = {score_rows<E, Q, 1>, score_rows<E, Q, 2>,
                                        score_rows<E, Q, 4>, score_rows<E, Q, 8>};
    found = all;
  });
  return found;
}

// A page's bounds, minima then maxima, meet one query as a row of 2 D dims: of the two products of
// a dim the larger is that of the minimum where q < 0, else that of the maximum. A NaN is in both.
inline float bound_weight(float q, bool of_minimum) {
  return q != q || (of_minimum ? q < 0 : q > 0) ? q : 0.0f;
}

// sum_d max(q_d * min_d, q_d * max_d) term by term: where a bound is infinite, the product above
// meets it with 0 and is NaN.
template <class Q, class E>
float page_bound(const Q* q, const E* page, int64_t d) {
  float sum = 0;
  for (int64_t i = 0; i < d; ++i) {
    float low = to_float(q[i]) * to_float(page[i]), high = to_float(q[i]) * to_float(page[d + i]);
    sum += low > high || low != low ? low : high;
  }
  return sum;
}

// ---- keys -----------------------------------------------------------------------------------

// Integers that order as the floats do. NaN orders as -inf, -0 as 0.
inline int32_t ordered_key(float x) {
  x = x == x ? x + 0.0f : -kInf;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The float that an ordered key is of; NaN for a hidden one.
inline float score_of(int32_t key) {
  int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Keys of a whole block, of which the mask knows the first n positions.
inline void store_keys(const float* score, const MaskRow& mask, const RowPlan& row, int64_t t, int64_t n,
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

// ---- probabilities --------------------------------------------------------------------------

// Scores of a whole block with what the mask adds, of which the mask knows the first n positions;
// NaN where the row sees no key.
inline void store_logits(const float* score, const MaskRow& mask, const RowPlan& row, int64_t t,
                         int64_t n, float* logit) {
  bool masked = row.holes || mask.additive();
  float least = mask.dtype == kBool ? -1.0f : hidden_below(mask.dtype);
  float bias[kBlock] = {};
  if (masked) {
    for (int64_t i = 0; i < n; ++i) bias[i] = mask.bias(t + i);
  }
  int64_t from = max_of<int64_t>(row.start - t, 0), to = min_of(row.end - t, n);
  for (int64_t i = 0; i < kBlock; ++i) {
    float value = score[i] == score[i] ? score[i] + bias[i] : -kInf;
    value = value == value ? value : -kInf;
    bool seen = i >= from && i < to && (!masked || bias[i] > least);
    logit[i] = seen ? value : std::numeric_limits<float>::quiet_NaN();
  }
}

// What a softmax divides by, over logits met so far: total * exp(most). Hidden and infinite ones
// are left aside.
struct Mass {
  float most = -kInf, total = 0;

  // n logits, whole blocks of them.
  void add(const float* logit, int64_t n) {
    float lane_most[16], lane_total[16] = {};
    for (int l = 0; l < 16; ++l) lane_most[l] = most;
    for (int64_t i = 0; i < n; i += 16) {
#pragma omp simd
      for (int l = 0; l < 16; ++l) {
        float x = logit[i + l] < kInf ? logit[i + l] : -kInf;
        lane_most[l] = x > lane_most[l] ? x : lane_most[l];
      }
    }
    float highest = most;
    for (int l = 0; l < 16; ++l) highest = max_of(highest, lane_most[l]);
    if (highest == -kInf) return;
    for (int64_t i = 0; i < n; i += 16) {
#pragma omp simd
      for (int l = 0; l < 16; ++l) {
        float x = logit[i + l] < kInf ? logit[i + l] : -kInf;
        lane_total[l] += exp_of(x - highest);
      }
    }
    add(Mass{highest, 0});
    for (int l = 0; l < 16; ++l) total += lane_total[l];
  }

  void add(const Mass& other) {
    float highest = max_of(most, other.most);
    if (highest == -kInf) return;
    total = total * exp_of(most - highest) + other.total * exp_of(other.most - highest);
    most = highest;
  }

  // 0 where no logit counts: those that are infinite then rank as they are.
  float log() const { return most == -kInf ? 0.0f : most + std::log(total); }
};

// Keys of 16 positions from the logits of a group, head after head `stride` apart: they order as
// the sums of the heads' probabilities. May write in place of the first head's.
inline void sum_probabilities(const float* logit, int64_t stride, int64_t heads,
                              const float* log_mass, int32_t* key) {
  float most[16], sum[16] = {};
  int32_t found[16];
  for (int l = 0; l < 16; ++l) most[l] = -kInf;
  for (int64_t g = 0; g < heads; ++g) {
#pragma omp simd
    for (int l = 0; l < 16; ++l) {
      float x = logit[g * stride + l] - log_mass[g];
      most[l] = x > most[l] ? x : most[l];
    }
  }
  for (int64_t g = 0; g < heads; ++g) {
#pragma omp simd
    for (int l = 0; l < 16; ++l) {
      sum[l] += exp_of(logit[g * stride + l] - log_mass[g] - most[l]);
    }
  }
#pragma omp simd
  for (int l = 0; l < 16; ++l) sum[l] = most[l] + log_of(sum[l]);
  for (int l = 0; l < 16; ++l) {
    found[l] = ordered_key(std::fabs(most[l]) < kInf ? sum[l] : most[l]);
  }
  for (int l = 0; l < 16; ++l) found[l] = logit[l] == logit[l] ? found[l] : kHidden;
  std::memcpy(key, found, sizeof(found));
}

}  // namespace loki
