// loki::update_pages on the CPU: the bounds of the pages that this step stored tokens in.

#include "cpu_common.h"

namespace loki {
namespace {

struct PagesParams {
  View4 pages;    // (B, Hkv, P, 2 D), dtype of keys; written
  View4 keys;     // (B, Hkv, T, D)
  View4 written;  // (B, Hkv, T, 1) after broadcasting, bool
  int64_t page;
};

// The bytes, 0 or 1, that say of one KV head which tokens were written.
struct Written {
  const char* byte;
  int64_t stride;

  Written(const View4& view, int64_t i, int64_t h)
      : byte(view.row<char>(i, h, 0)), stride(view.step(2)) {}

  // The first written token of [from, to), or `to`. Most steps write one in a long cache.
  int64_t next(int64_t from, int64_t to) const {
    if (stride == 1) {
      const void* found = std::memchr(byte + from, 1, to - from);
      return found ? static_cast<const char*>(found) - byte : to;
    }
    while (from < to && !byte[from * stride]) ++from;
    return from;
  }
  // Position behind the last one.
  int64_t until(int64_t from, int64_t to) const {
    while (to > from && !byte[(to - 1) * stride]) --to;
    return to;
  }
};

// Bounds of n rows. A NaN bounds nothing: both are NaN where all rows have one.
template <class E>
void bound(const E* rows, int64_t stride, int64_t n, int64_t d, E* low, E* high) {
  constexpr int64_t kDims = 64;
  for (int64_t d0 = 0; d0 < d; d0 += kDims) {
    int64_t dims = min_of(kDims, d - d0);
    float least[kDims], most[kDims];
    for (int64_t x = 0; x < kDims; ++x) least[x] = kInf, most[x] = -kInf;
    for (int64_t i = 0; i < n; ++i) {
      const E* row = rows + i * stride + d0;
      for (int64_t x = 0; x < dims; ++x) {
        float value = to_float(row[x]);
        least[x] = value < least[x] ? value : least[x];
        most[x] = value > most[x] ? value : most[x];
      }
    }
    for (int64_t x = 0; x < dims; ++x) {
      if (least[x] > most[x]) least[x] = most[x] = std::numeric_limits<float>::quiet_NaN();
      from_float(least[x], low + d0 + x);
      from_float(most[x], high + d0 + x);
    }
  }
}

void update_pages(const PagesParams& p) {
  int64_t t = p.keys.size[2], d = p.keys.size[3];
  for (int64_t i = 0; i < p.keys.size[0]; ++i) {
    for (int64_t h = 0; h < p.keys.size[1]; ++h) {
      Written written(p.written, i, h);
      for (int64_t at = written.next(0, t); at < t;) {
        int64_t from = at / p.page * p.page, behind = min_of(from + p.page, t);
        int64_t to = written.until(at, behind);
        at = written.next(behind, t);
        with_float_type(p.keys.dtype, [&](auto type) {
          using E = decltype(type);
          E* low = const_cast<E*>(p.pages.row<E>(i, h, from / p.page));
          bound(p.keys.row<E>(i, h, from), p.keys.stride[2], to - from, d, low, low + d);
        });
      }
    }
  }
}

}  // namespace
}  // namespace loki

extern "C" __attribute__((visibility("default"))) int64_t loki_update_pages(
    const loki::PagesParams* params) {
  loki::update_pages(*params);
  return 0;
}
