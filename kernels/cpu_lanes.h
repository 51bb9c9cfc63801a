// Rows against queries on processors without AVX-512: with AVX2, with NEON, or in vectors of 16
// bytes of which the compiler makes what it can. A row lies in vectors along its dims; queries lie
// head after head, each with zeros behind its last dim.
#pragma once

#include "cpu_common.h"

#if !LOKI_AVX512

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace loki {

// Registers hold kSums sums of products: of a few rows with at most kTileHeads heads.
#if LOKI_AVX2
using Lanes = __m256;
constexpr int kLanes = 8, kSums = 8, kTileHeads = 4;
#elif defined(__aarch64__)
using Lanes = float32x4_t;
constexpr int kLanes = 4, kSums = 16, kTileHeads = 8;
#else
using Lanes = float __attribute__((vector_size(16)));
constexpr int kLanes = 4, kSums = 8, kTileHeads = 4;
#endif

// Eight floats. As one vector of 32 bytes, or as an array, g++ would keep them in memory where
// registers have 16.
struct Float8 {
  Lanes first;
#if !LOKI_AVX2
  Lanes second;
#endif
};

#if !LOKI_AVX2 && !defined(__aarch64__)
using Bits4 = uint32_t __attribute__((vector_size(16)));

// Four floats from 16 bits each.
LOKI_INLINE inline Bits4 widen4(const void* at) {
  uint16_t narrow __attribute__((vector_size(8)));
  std::memcpy(&narrow, at, sizeof(narrow));
  return __builtin_convertvector(narrow, Bits4);
}

// The exponent of a half is 112 less than that of a float with its bits.
LOKI_INLINE inline Lanes from_halves(const void* at) {
  Bits4 half = widen4(at), size = (half & 0x7fff) << 13;
  Bits4 value = reinterpret_cast<Bits4>(reinterpret_cast<Lanes>(size) * 0x1p112f);
  Bits4 special = reinterpret_cast<Bits4>(size >= 0x0f800000u) & 0x7f800000u;  // infinite, NaN
  return reinterpret_cast<Lanes>(value | special | (half & 0x8000u) << 16);
}
#endif

template <class E>
LOKI_INLINE inline Float8 load8(const E* at) {
  Float8 out;
  if constexpr (std::is_same_v<E, float>) {
    std::memcpy(&out.first, at, sizeof(out.first));
#if !LOKI_AVX2
    std::memcpy(&out.second, at + kLanes, sizeof(out.second));
#endif
  } else if constexpr (std::is_same_v<E, BFloat16>) {
#if LOKI_AVX2
    __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    out.first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
#elif defined(__aarch64__)
    uint16x8_t narrow = vld1q_u16(&at->bits), zero = vdupq_n_u16(0);
    out.first = vreinterpretq_f32_u16(vzip1q_u16(zero, narrow));
    out.second = vreinterpretq_f32_u16(vzip2q_u16(zero, narrow));
#else
    out.first = reinterpret_cast<Lanes>(widen4(at) << 16);
    out.second = reinterpret_cast<Lanes>(widen4(at + 4) << 16);
#endif
  } else if constexpr (std::is_same_v<E, Float16>) {
#if LOKI_AVX2
    out.first = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__aarch64__)
    float16x8_t narrow = vld1q_f16(at);
    out.first = vcvt_f32_f16(vget_low_f16(narrow));
    out.second = vcvt_high_f32_f16(narrow);
#else
    out.first = from_halves(at);
    out.second = from_halves(at + 4);
#endif
  } else {
    float wide[8];
    for (int i = 0; i < 8; ++i) wide[i] = at[i];
    out = load8(wide);
  }
  return out;
}

// The first n < 8, then zeros.
template <class E>
inline Float8 load8(const E* at, int64_t n) {
  E padded[8] = {};
  std::memcpy(padded, at, n * sizeof(E));
  return load8(padded);
}

LOKI_INLINE inline void store8(const Float8& x, float* to) { std::memcpy(to, &x, sizeof(x)); }

// sum += x * y
LOKI_INLINE inline void add_product(Float8* sum, const Float8& x, float y) {
  sum->first += x.first * y;
#if !LOKI_AVX2
  sum->second += x.second * y;
#endif
}

// Products of eight numbers, some to each lane.
LOKI_INLINE inline void add_product(Lanes* sum, const Float8& x, const Float8& y) {
  *sum += x.first * y.first;
#if !LOKI_AVX2
  *sum += x.second * y.second;
#endif
}

// to[i] = the sum over the lanes of sum[i].
LOKI_INLINE inline void put_sums(const Lanes* sum, float* to) {
#if LOKI_AVX2
  __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
  __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(sum[4], sum[5]), _mm256_hadd_ps(sum[6], sum[7]));
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                     _mm256_permute2f128_ps(low, high, 0x31)));
#elif defined(__aarch64__)
  unroll<kSums / 4>([&](auto i) LOKI_INLINE {
    const float32x4_t* x = sum + 4 * i;
    vst1q_f32(to + 4 * i, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
  });
#else
  unroll<kSums>([&](auto i) LOKI_INLINE {
    to[i] = (sum[i][0] + sum[i][2]) + (sum[i][1] + sum[i][3]);
  });
#endif
}

#if LOKI_BF16_DOTS
struct Bf16x8 {
  bfloat16x8_t value;
};
LOKI_INLINE inline Bf16x8 load_bf16(const BFloat16* at) {
  return {vreinterpretq_bf16_u16(vld1q_u16(&at->bits))};
}
LOKI_INLINE inline Bf16x8 load_bf16(const BFloat16* at, int64_t n) {
  BFloat16 padded[8] = {};
  std::memcpy(padded, at, n * sizeof(BFloat16));
  return load_bf16(padded);
}
LOKI_INLINE inline void add_product(Lanes* sum, const Bf16x8& x, const Bf16x8& y) {
  *sum = vbfdotq_f32(*sum, x.value, y.value);
}
#endif

// Eight numbers of a row or of a query as they are multiplied: as floats, or as bf16 where both are.
template <class E, class Q, class... Left>
LOKI_INLINE inline auto load_factor(const E* at, Left... left) {
#if LOKI_BF16_DOTS
  if constexpr (std::is_same_v<Q, BFloat16>) {
    return load_bf16(at, left...);
  } else {
    return load8(at, left...);
  }
#else
  return load8(at, left...);
#endif
}

template <int GB>
constexpr int kHeadsOf = GB < kTileHeads ? GB : kTileHeads;
template <int GB>
constexpr int kRowsOf = kSums / kHeadsOf<GB>;  // that are taken together

// dot[i * GB + g] = row[i] . q[g] for kRowsOf<GB> rows of E and GB heads of q, `stride` numbers of Q
// each; meanwhile rows `ahead` are fetched, unless there are none.
template <class E, class Q, int GB>
LOKI_INLINE inline void dot_rows(const E* const* row, const E* const* ahead, int64_t d, const Q* q,
                                 int64_t stride, float* dot) {
  constexpr int kHeads = kHeadsOf<GB>, kRows = kRowsOf<GB>;
  const int64_t chunks = (d + 7) / 8;
  for (int first = 0; first < GB; first += kHeads, q += kHeads * stride, ahead = nullptr) {
    Lanes sum[kSums] = {};
    int64_t due = 0;
    auto chunk = [&](int64_t done, auto... left) LOKI_INLINE {
      for (due += ahead ? kRows : 0; due >= chunks; due -= chunks) prefetch(*ahead++, d * sizeof(E));
      if constexpr (kRows <= kHeads) {  // the fewer wait in registers
        decltype(load_factor<E, Q>(row[0])) value[kRows];
        unroll<kRows>([&](auto i) LOKI_INLINE {
          value[i] = load_factor<E, Q>(row[i] + done, left...);
        });
        unroll<kHeads>([&](auto g) LOKI_INLINE {
          auto weight = load_factor<Q, Q>(q + g * stride + done);
          unroll<kRows>([&](auto i) LOKI_INLINE {
            add_product(&sum[i * kHeads + g], value[i], weight);
          });
        });
      } else {
        decltype(load_factor<Q, Q>(q)) weight[kHeads];
        unroll<kHeads>([&](auto g) LOKI_INLINE {
          weight[g] = load_factor<Q, Q>(q + g * stride + done);
        });
        unroll<kRows>([&](auto i) LOKI_INLINE {
          auto value = load_factor<E, Q>(row[i] + done, left...);
          unroll<kHeads>([&](auto g) LOKI_INLINE {
            add_product(&sum[i * kHeads + g], value, weight[g]);
          });
        });
      }
    };
    int64_t done = 0;
    for (; done + 8 <= d; done += 8) chunk(done);
    if (done < d) chunk(done, d - done);
    float found[kSums];
    put_sums(sum, found);
    unroll<kRows>([&](auto i) LOKI_INLINE {
      std::memcpy(dot + i * GB + first, found + i * kHeads, kHeads * sizeof(float));
    });
  }
}

#if defined(__aarch64__)

// An int8 index meets a query in fixed point (`Query` of cpu_score.h): numbers of 16 bits, head after
// head; or its two limbs, one after the other, where the processor multiplies bytes.
constexpr int kIntSums = LOKI_SDOT ? 2 : 1;  // of a row with a head

#if LOKI_SDOT
using Ints = int32x4_t;
using Row16 = int8x16_t;
LOKI_INLINE inline Row16 load16(const int8_t* at) { return vld1q_s8(at); }
LOKI_INLINE inline void add_products(Ints* sum, Row16 row, const int8_t* query, int64_t columns) {
  sum[0] = vdotq_s32(sum[0], row, vld1q_s8(query));
  sum[1] = vdotq_s32(sum[1], row, vld1q_s8(query + columns));
}
#else
using Ints = int32x4_t;
using Row16 = int16x8x2_t;
LOKI_INLINE inline Row16 load16(const int8_t* at) {
  int8x16_t narrow = vld1q_s8(at);
  return {{vmovl_s8(vget_low_s8(narrow)), vmovl_high_s8(narrow)}};
}
LOKI_INLINE inline void add_products(Ints* sum, Row16 row, const int8_t* query, int64_t) {
  unroll<2>([&](auto half) LOKI_INLINE {
    int16x8_t weight = vreinterpretq_s16_s8(vld1q_s8(query + 16 * half));
    *sum = vmlal_s16(*sum, vget_low_s16(row.val[half]), vget_low_s16(weight));
    *sum = vmlal_high_s16(*sum, row.val[half], weight);
  });
}
#endif

LOKI_INLINE inline void put_sums(const Ints* sum, int32_t* to) {
  unroll<kSums / 4>([&](auto i) LOKI_INLINE {
    const int32x4_t* x = sum + 4 * i;
    vst1q_s32(to + 4 * i, vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])));
  });
}

template <int GB>
constexpr int kIntRowsOf = kSums / (kHeadsOf<GB> * kIntSums);

// dot[i * GB + g] = row[i] . head g for kIntRowsOf<GB> rows of r dims, a query in fixed point of
// `columns` dims, a multiple of 16.
template <int GB>
LOKI_INLINE inline void dot_int_rows(const int8_t* const* row, int64_t r, const int8_t* query,
                                     int64_t columns, float* dot) {
  constexpr int kHeads = kHeadsOf<GB>, kRows = kIntRowsOf<GB>;
  for (int first = 0; first < GB; first += kHeads, query += kHeads * 2 * columns) {
    Ints sum[kSums] = {};
    auto chunk = [&](auto load, int64_t done) LOKI_INLINE {
      unroll<kRows>([&](auto i) LOKI_INLINE {
        Row16 value = load(row[i] + done);
        unroll<kHeads>([&](auto g) LOKI_INLINE {
          const int8_t* weight = query + g * 2 * columns + done * (2 / kIntSums);
          add_products(&sum[(i * kHeads + g) * kIntSums], value, weight, columns);
        });
      });
    };
    int64_t done = 0;
    for (; done + 16 <= r; done += 16) chunk(load16, done);
    if (done < r) {
      auto load_left = [&](const int8_t* at) LOKI_INLINE {
        int8_t padded[16] = {};
        std::memcpy(padded, at, r - done);
        return load16(padded);
      };
      chunk(load_left, done);
    }
    int32_t found[kSums];
    put_sums(sum, found);
    unroll<kRows * kHeads>([&](auto i) LOKI_INLINE {
      float low = static_cast<float>(found[i * kIntSums]);
      float high = kIntSums == 2 ? static_cast<float>(found[i * kIntSums + kIntSums - 1]) : 0.0f;
      dot[i / kHeads * GB + first + i % kHeads] = high * 256.0f + low;
    });
  }
}

#endif

}  // namespace loki

#endif
