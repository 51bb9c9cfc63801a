// What all CPU kernels share: element types, masks, scratch memory, vectors.
// Legend: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, S new tokens, T cached tokens,
// D dims of q and k, Dv dims of v, R index dims, K position slots. Strides count elements.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <type_traits>
#include <utility>

// Declared here because clang often comes without omp.h.
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

// What the AVX-512 code needs; conversions of fp16 (F16C) and FMA come with it on every processor.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LOKI_AVX512 1
#else
#define LOKI_AVX512 0
#endif
#if !LOKI_AVX512 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LOKI_AVX2 1
#else
#define LOKI_AVX2 0
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if LOKI_AVX512 && defined(__AVX512VNNI__)
#define LOKI_VNNI 1
#else
#define LOKI_VNNI 0
#endif
// Products of bytes on ARM.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define LOKI_SDOT 1
#else
#define LOKI_SDOT 0
#endif
// Whether an int8 index is met in integers.
#if LOKI_VNNI || LOKI_AVX2 || defined(__aarch64__)
#define LOKI_INT8_DOTS 1
#else
#define LOKI_INT8_DOTS 0
#endif
#if (LOKI_AVX512 && defined(__AVX512BF16__)) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LOKI_BF16_DOTS 1
#else
#define LOKI_BF16_DOTS 0
#endif

namespace loki {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Codes shared with cpu.py.
enum Dtype : int64_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3, kBool = 4, kNone = 5 };

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// g++ has _Float16 in C++ from version 13 on ARM, 12 on x86.
#if defined(__aarch64__)
using Float16 = __fp16;
#elif defined(__FLT16_MANT_DIG__)
using Float16 = _Float16;
#elif defined(__F16C__)
struct Float16 {
  uint16_t bits;
};
inline float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
inline void from_float(float x, Float16* out) { out->bits = _cvtss_sh(x, 0); }
#else
#error "neither the compiler nor the processor knows float16: g++ 12 or newer is needed"
#endif
#if defined(__aarch64__) || defined(__FLT16_MANT_DIG__)
inline float to_float(Float16 x) { return static_cast<float>(x); }
inline void from_float(float x, Float16* out) { *out = static_cast<Float16>(x); }
#endif

// The float type that a library serves alone, or kNone for any, mixed as they may be. What a model does
// not use is most of what there is to compile.
#ifdef LOKI_ONLY
constexpr int64_t kOnly = LOKI_ONLY;
#else
constexpr int64_t kOnly = kNone;
#endif

// Calls f with a value of the element type that `dtype` names.
template <class F>
void with_float_type([[maybe_unused]] int64_t dtype, F&& f) {
  if constexpr (kOnly == kBFloat16) {
    f(BFloat16{});
  } else if constexpr (kOnly == kFloat16) {
    f(Float16{});
  } else if constexpr (kOnly == kFloat32) {
    f(float{});
  } else if (dtype == kBFloat16) {
    f(BFloat16{});
  } else if (dtype == kFloat16) {
    f(Float16{});
  } else {
    f(float{});
  }
}

// A tensor of rank 4 as passed from Python; a dim of size 1 broadcasts.
struct View4 {
  const char* data;
  int64_t dtype;
  int64_t size[4];
  int64_t stride[4];

  int64_t step(int dim) const { return size[dim] == 1 ? 0 : stride[dim]; }
  int64_t element_size() const {
    return dtype == kFloat32 ? 4 : (dtype == kBFloat16 || dtype == kFloat16) ? 2 : 1;
  }
  template <class E>
  const E* row(int64_t i, int64_t h, int64_t s) const {
    return reinterpret_cast<const E*>(data) + i * step(0) + h * step(1) + s * step(2);
  }
};

// One mask row (T): what is hidden, and what is added to the logits.
struct MaskRow {
  const char* data = nullptr;
  int64_t dtype = kNone;
  int64_t stride = 0;

  MaskRow() = default;
  MaskRow(const View4& mask, int64_t i, int64_t h, int64_t s)
      : dtype(mask.dtype), stride(mask.stride[3]) {
    if (dtype == kNone) return;
    int64_t offset = i * mask.step(0) + h * mask.step(1) + s * mask.step(2);
    data = mask.data + offset * mask.element_size();
  }

  bool additive() const { return dtype != kNone && dtype != kBool; }

  // 0 or -inf for a bool mask.
  float bias(int64_t t) const {
    switch (dtype) {
      case kBool: return data[t * stride] ? 0.0f : -kInf;
      case kBFloat16: return to_float(reinterpret_cast<const BFloat16*>(data)[t * stride]);
      case kFloat16: return to_float(reinterpret_cast<const Float16*>(data)[t * stride]);
      case kFloat32: return reinterpret_cast<const float*>(data)[t * stride];
      default: return 0.0f;
    }
  }

  // The first position of [from, to) that is not at -inf, or `to`.
  int64_t next_seen(int64_t from, int64_t to) const {
    if (dtype == kBool && stride == 1 && from < to) {
      const void* found = std::memchr(data + from, 1, to - from);
      return found ? static_cast<const char*>(found) - data : to;
    }
    while (from < to && bias(from) == -kInf) ++from;
    return from;
  }
  // The position behind the last of [from, to) that is not at -inf, or `from`.
  int64_t seen_until(int64_t from, int64_t to) const {
    if (dtype == kBool && stride == 1) {  // eight at a time: a static cache may be mostly empty
      for (uint64_t word = 0; to - from >= 8; to -= 8) {
        std::memcpy(&word, data + to - 8, 8);
        if (word) break;
      }
    }
    while (to > from && bias(to - 1) == -kInf) --to;
    return to;
  }
};

// Grow-only memory that outlives the calls: a fresh allocation of this size would fault in its
// pages at every call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Null where there is not so much memory; what was held before is given back then too.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + (1 << 20)) & ~static_cast<size_t>(63);
      data_ = std::aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
template <class T>
inline T min_of(T a, T b) { return a < b ? a : b; }
template <class T>
inline T max_of(T a, T b) { return a > b ? a : b; }

#define LOKI_INLINE __attribute__((always_inline))

// Into the second cache, where there is room for what is read much later; fetched into the first,
// rows came at two thirds of the speed.
LOKI_INLINE inline void prefetch(const void* row, int64_t bytes) {
  const char* at = static_cast<const char*>(row);
  for (int64_t done = 0; done < bytes; done += 64) __builtin_prefetch(at + done, 0, 2);
}

// f(0), f(1), ... f(N - 1) with constant arguments. A loop that the compiler unrolls late leaves
// arrays of vector registers in memory.
template <class F, int... I>
LOKI_INLINE inline void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
LOKI_INLINE inline void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// exp(x) for x <= 88, to 1 ulp or two; 0 below -87.3. After Cephes expf.
inline float exp_of(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  float shifted = x * 1.44269504088896341f + kShift;
  float n = shifted - kShift;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.3f ? 0.0f : p * power;
}

// log(x) for a normal x > 0, to 1 ulp or two. After Cephes logf.
inline float log_of(float x) {
  constexpr int32_t kLeast = 0x3f3504f3;  // sqrt(0.5), from where on the fraction counts
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  float n = static_cast<float>((bits - kLeast) >> 23);
  bits = ((bits - kLeast) & 0x7fffff) + kLeast;
  float z;
  std::memcpy(&z, &bits, 4);
  z -= 1.0f;
  float p = 7.0376836292e-2f;
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  float square = z * z;
  return (p * z * square - n * 2.12194440e-4f - 0.5f * square + z) + n * 0.693359375f;
}

// Parts that so much reading is cut into, one for each thread that it pays. They follow from the
// sizes alone: what sums come to does not depend on how many threads there are at the moment.
inline int64_t parts_for(int64_t bytes, int64_t threads) {
  constexpr int64_t kBytesPerThread = 1 << 18;  // 20 us of one thread
  return max_of<int64_t>(min_of(threads, bytes / kBytesPerThread), 1);
}

// Whether other processes hold the cores that our threads would run on. A region is left when its
// last thread is done, and one without a core begins milliseconds late: after such a region the
// calling thread works alone for a while, twice as long each time that it finds the cores taken.
class Crowd {
 public:
  int64_t workers(int64_t parts) {
    if (parts < 2 || alone_ == 0) return parts;
    --alone_;
    return 1;
  }

  void met(double late_seconds) {
    if (late_seconds < kLate) {
      pause_ = 0;
    } else {
      alone_ = pause_ = min_of(max_of(2 * pause_, kLeastPause), kMostPause);
    }
  }

 private:
  static constexpr double kLate = 3e-4;
  static constexpr int64_t kLeastPause = 32, kMostPause = 2048;  // calls
  int64_t alone_ = 0, pause_ = 0;
};

inline double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// f(worker, workers) by several threads in one region, as many as there are parts, or by one.
template <class F>
void in_parallel(int64_t parts, F&& f) {
  thread_local Crowd crowd;
  int64_t workers = crowd.workers(parts);
  if (workers < 2) return f(int64_t{0}, int64_t{1});
  double begin = seconds(), late = 0, done = begin;
#pragma omp parallel num_threads(static_cast<int>(workers))
  {
    int64_t me = omp_get_thread_num();
    if (me > 0) {
      double mine = seconds() - begin;
#pragma omp critical(loki_late)
      late = max_of(late, mine);
    }
    f(me, int64_t{omp_get_num_threads()});
    if (me == 0) done = seconds();
  }
  crowd.met(max_of(late, seconds() - done));
}

// Heads are taken through a kernel 1, 2, 4 or 8 at a time; a block that is not full repeats its
// last head.
inline int64_t head_block(int64_t heads_left) {
  return heads_left > 4 ? 8 : heads_left > 2 ? 4 : heads_left;
}

}  // namespace loki
