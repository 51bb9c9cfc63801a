// Rows of keys against queries, each row in vectors along its dims: for rows of many dims.
//
// Queries, and the rows that they meet, each have a float type of their own (under autocast a
// cache's differs from that of queries), so this is compiled for one type each.
#pragma once

#include "cpu_lanes.h"

namespace loki {

// Where dim d of a row lies once it is unpacked to floats. `halves`: its elements have 16 bits.
inline int64_t unpacked_slot([[maybe_unused]] bool halves, int64_t d) {
#if LOKI_AVX512
  if (halves) return d / 32 * 32 + d % 2 * 16 + d % 32 / 2;
#endif
  return d;
}

// Whether queries meet rows of K as bf16, which they stay where the processor multiplies it: the
// products are exact in fp32 either way. Else they are floats.
inline bool bf16_dots(int64_t q_dtype, int64_t k_dtype) {
  return LOKI_BF16_DOTS && q_dtype == kBFloat16 && k_dtype == kBFloat16;
}

// Calls f with a value of the element type of rows, and one of the type in which queries meet them.
template <class F>
void with_row_types(int64_t row_dtype, [[maybe_unused]] int64_t q_dtype, F&& f) {
  with_float_type(row_dtype, [&](auto row) {
    if constexpr (LOKI_BF16_DOTS && std::is_same_v<decltype(row), BFloat16>) {
      if (kOnly == kBFloat16 || q_dtype == kBFloat16) return f(row, BFloat16{});
    }
    if constexpr (!(LOKI_BF16_DOTS && kOnly == kBFloat16)) f(row, float{});
  });
}

// Where dim d of head g of `heads` lies among queries of type Q, which meet keys of 16 bits
// (`halves`) or 32: vector after vector, in each head after head; where vectors are left to the
// compiler, head after head, each of `size`.
template <class Q>
inline int64_t query_slot([[maybe_unused]] bool halves, [[maybe_unused]] int64_t heads, int64_t g,
                          int64_t d, [[maybe_unused]] int64_t size) {
#if LOKI_AVX512
  constexpr int64_t kVector = 64 / sizeof(Q);
  int64_t slot = kVector == 16 ? unpacked_slot(halves, d) : d;
  return (slot / kVector * heads + g) * kVector + slot % kVector;
#else
  return g * size + d;
#endif
}

#if LOKI_AVX512

// A chunk is 64 bytes of a row, unpacked to one or two vectors of floats: 16-bit values go to the
// two by turns.
template <class E>
struct Chunk {
  static constexpr int64_t kSize = 64 / sizeof(E);
  static constexpr int kVectors = sizeof(E) == 2 ? 2 : 1;
};

inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
inline __mmask16 first16(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

// Vector `Half` of a chunk.
template <int Half, class E>
inline __m512 unpack(__m512i chunk, E) {
  if constexpr (sizeof(E) == 4) {
    return _mm512_castsi512_ps(chunk);
  } else if constexpr (std::is_same_v<E, Float16>) {
    return _mm512_cvtph_ps(
        _mm512_cvtepi32_epi16(Half == 0 ? chunk : _mm512_srli_epi32(chunk, 16)));
  } else if constexpr (Half == 0) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(chunk, 16));
  } else {
    return _mm512_castsi512_ps(
        _mm512_and_si512(chunk, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
}

// `left` values at most; Whole says that a chunk is there.
template <bool Whole, class E>
inline __m512i load_chunk(const E* at, int64_t left) {
  if constexpr (Whole) {
    return _mm512_loadu_si512(at);
  } else if constexpr (sizeof(E) == 2) {
    return _mm512_maskz_loadu_epi16(first32(left), at);
  } else {
    return _mm512_maskz_loadu_epi32(first16(left), at);
  }
}

// Lane i of the result is the sum over the lanes of value[i].
inline __m512 sums_of_16(const __m512* value) {
  __m512 quad[4];
  for (int i = 0; i < 4; ++i) {
    const __m512* x = value + 4 * i;
    __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512d dlow = _mm512_castps_pd(low), dhigh = _mm512_castps_pd(high);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(dlow, dhigh)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(dlow, dhigh)));
  }
  auto fold = [](__m512 x, __m512 y, auto even, auto odd) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, decltype(even)::value),
                         _mm512_shuffle_f32x4(x, y, decltype(odd)::value));
  };
  using Low = std::integral_constant<int, 0x44>;
  using High = std::integral_constant<int, 0xee>;
  using Even = std::integral_constant<int, 0x88>;
  using Odd = std::integral_constant<int, 0xdd>;
  return fold(fold(quad[0], quad[1], Low{}, High{}), fold(quad[2], quad[3], Low{}, High{}), Even{},
              Odd{});
}

// Lane i * GB + head of the result is q . row[i], of d dims, for 16 / GB rows; meanwhile `ahead[i]`
// are fetched, row after row: lines in any other order came at half the memory's speed. Rows of E,
// queries of Q as `query_slot` has them.
template <class E, class Q, int GB>
LOKI_INLINE inline __m512 dot_rows(const E* const* row, const E* const* ahead, const Q* q,
                                   int64_t d) {
  constexpr int kRows = 16 / GB, kVectors = Chunk<E>::kVectors;
  constexpr int64_t kSize = Chunk<E>::kSize;
  __m512 sum[kRows * GB];
  unroll<kRows * GB>([&](auto i) LOKI_INLINE { sum[i] = _mm512_setzero_ps(); });
  const int64_t chunks = (d + kSize - 1) / kSize;
  int64_t due = 0;
  const E* const* next = ahead;
  auto chunk = [&](auto whole, int64_t done) LOKI_INLINE {
    for (due += kRows; due >= chunks; due -= chunks) prefetch(*next++, d * sizeof(E));
    auto load_row = [&](int i) LOKI_INLINE {
      return load_chunk<decltype(whole)::value>(row[i] + done, d - done);
    };
#if LOKI_BF16_DOTS
    if constexpr (std::is_same_v<Q, BFloat16>) {
      __m512i weight[GB];
      unroll<GB>([&](auto g) LOKI_INLINE {
        weight[g] = _mm512_loadu_si512(q + done * GB + kSize * g);
      });
      unroll<kRows>([&](auto i) LOKI_INLINE {
        __m512bh value = reinterpret_cast<__m512bh>(load_row(i));
        unroll<GB>([&](auto g) LOKI_INLINE {
          sum[i * GB + g] = _mm512_dpbf16_ps(sum[i * GB + g], value,
                                             reinterpret_cast<__m512bh>(weight[g]));
        });
      });
      return;
    }
#endif
    unroll<kVectors>([&](auto half) LOKI_INLINE {
      __m512 weight[GB];
      unroll<GB>([&](auto g) LOKI_INLINE {
        weight[g] = _mm512_loadu_ps(q + done * GB + 16 * (half * GB + g));
      });
      unroll<kRows>([&](auto i) LOKI_INLINE {
        __m512 value = unpack<half>(load_row(i), E{});
        unroll<GB>([&](auto g) LOKI_INLINE {
          sum[i * GB + g] = _mm512_fmadd_ps(value, weight[g], sum[i * GB + g]);
        });
      });
    });
  };
  int64_t done = 0;
  for (; done + kSize <= d; done += kSize) chunk(std::true_type{}, done);
  if (done < d) chunk(std::false_type{}, done);
  return sums_of_16(sum);
}

#endif

}  // namespace loki
