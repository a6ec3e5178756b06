// The first and the third stage where the lanes are elements of a vector: for so few queries that
// lanes over queries would stand empty. K and V are read where they lie, each byte once, and
// widened in registers; nothing is packed or transposed. A row is a query of one head.
#pragma once

#include <cstdint>

#include "constants.h"
#include "tile_io.h"

namespace numattn {
namespace {

// Rows that go through K or V together: for K at most a vector of sums; for V as many as leave
// registers for whole rows of V.
template <class Simd>
constexpr int kQkRows = Simd::kLanes < 4 ? Simd::kLanes : 4;
constexpr int kValueRows = 2;
template <class Simd>
constexpr int kValueVectors = 2 * Simd::kTileVectors;

// Rows of K or V, of as many keys as a block has, and of kKeysAhead more.
//
// K and V are read row after row, from beginning to end: what a CPU fetches by itself ahead of such
// reads comes at more than twice the speed of four rows at a time, or of halves of rows (measured
// on Zen 4). It loses its way where a block of K ends and one of V begins; fetching by
// instructions, into the second cache because the first one has too few places for what is on its
// way, is worth another 10 to 40 %.
struct RowPointers {
  const char* const* rows;
  int64_t column_stride;
  int64_t bytes;  // of a row; not positive where elements stand in reverse
};

constexpr int64_t kKeysAhead = 16;
constexpr int64_t kBytesPerLine = 64;

inline void fetch_ahead(const RowPointers& from, int64_t key) {
  const char* const row = from.rows[key + kKeysAhead];
  for (int64_t i = 0; i < from.bytes; i += kBytesPerLine) {
    __builtin_prefetch(row + i, 0, 2);
  }
}

// All lanes of x[i] added up become lane i.
template <class Simd>
typename Simd::Vec sum_each(typename Simd::Vec (&x)[Simd::kLanes]) {
  if constexpr (requires { Simd::sum_each(x); }) return Simd::sum_each(x);
  Simd::transpose(x);
#pragma GCC unroll 5
  for (int width = Simd::kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) x[i] = Simd::add(x[i], x[i + width]);
  }
  return x[0];
}

// logits [key][lane] = K [key][d] . queries [row][d], for kKeys keys whose rows are given and kRows
// lanes; kWidth lanes are a row of logits. Elements of K are `column_stride` bytes apart.
template <class Simd, class Element, int kRows, int kKeys, bool kSideBySide>
void dot_products(const char* const* k_rows, int64_t column_stride,
                  const typename Simd::Scalar* queries, int64_t head_dim, int64_t width,
                  typename Simd::Scalar* logits) {
  static_assert(kRows * kKeys <= Simd::kLanes);
  const auto load = [&](int key, int64_t d, int64_t count) {
    const char* const from = k_rows[key] + d * column_stride;
    if constexpr (kSideBySide) {
      return load_up_to<Simd>(reinterpret_cast<const Element*>(from), count);
    } else {
      return load_elements<Simd, Element>(from, column_stride, count);
    }
  };
  typename Simd::Vec sums[Simd::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Simd::kLanes; ++i) sums[i] = Simd::zero();
  // Two rows at a time are near enough to reading one after the other, and share the queries'
  // loads.
  constexpr int kTogether = kKeys % 2 == 0 && sizeof(Element) < 4 ? 2 : 1;
#pragma GCC unroll 8
  for (int first = 0; first < kKeys; first += kTogether) {
    const auto add = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      typename Simd::Vec piece[kTogether];
#pragma GCC unroll 2
      for (int i = 0; i < kTogether; ++i) piece[i] = load(first + i, d, count);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const auto query = load_up_to<Simd>(queries + row * head_dim + d, count);
#pragma GCC unroll 2
        for (int i = 0; i < kTogether; ++i) {
          auto& sum = sums[(first + i) * kRows + row];
          sum = Simd::fma(piece[i], query, sum);
        }
      }
    };
    int64_t d = 0;
    for (; d + Simd::kLanes <= head_dim; d += Simd::kLanes) add(d, Simd::kLanes);
    if (d < head_dim) add(d, head_dim - d);
  }

  typename Simd::Scalar products[Simd::kLanes];
  Simd::store(products, sum_each<Simd>(sums));
#pragma GCC unroll 16
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      logits[key * width + row] = products[key * kRows + row];
    }
  }
}

// The same for `keys` keys. Whoever goes through K first fetches it.
template <class Simd, class Element, int kRows, bool kSideBySide>
void qk_rows(const RowPointers& k, int64_t keys, bool fetch, const typename Simd::Scalar* queries,
             int64_t head_dim, int64_t width, typename Simd::Scalar* logits) {
  constexpr int kFit = Simd::kLanes / kRows;
  constexpr int kKeys = kFit < 8 ? kFit : 8;
  int64_t key = 0;
  for (; key + kKeys <= keys; key += kKeys) {
    for (int i = 0; fetch && i < kKeys; ++i) fetch_ahead(k, key + i);
    dot_products<Simd, Element, kRows, kKeys, kSideBySide>(k.rows + key, k.column_stride, queries,
                                                           head_dim, width, logits + key * width);
  }
  for (; key < keys; ++key) {
    if (fetch) fetch_ahead(k, key);
    dot_products<Simd, Element, kRows, 1, kSideBySide>(k.rows + key, k.column_stride, queries,
                                                       head_dim, width, logits + key * width);
  }
}

// output [row][d] = output * rescale [lane] + weights [key][lane] * V [key][d], for kVectors
// vectors from element d on, of which the last one has `last` elements; `width` lanes are a row of
// weights. attended [key] has the lanes that may read a key, or is null if all may: a weight of 0
// would let a NaN through.
template <class Simd, class Element, int kRows, int kVectors, bool kSideBySide>
void add_values(const RowPointers& v, int64_t keys, bool fetch, int64_t d, int64_t last,
                const typename Simd::Scalar* weights, int64_t width, const uint64_t* attended,
                int64_t value_dim, const typename Simd::Scalar* rescale,
                typename Simd::Scalar* output) {
  const auto elements = [&](int i) { return i == kVectors - 1 ? last : Simd::kLanes; };
  typename Simd::Vec sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) sums[row][i] = Simd::zero();
  }
  for (int64_t key = 0; key < keys; ++key) {
    if (fetch) fetch_ahead(v, key);
    typename Simd::Vec value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const char* const from = v.rows[key] + (d + i * Simd::kLanes) * v.column_stride;
      if constexpr (kSideBySide) {
        value[i] = load_up_to<Simd>(reinterpret_cast<const Element*>(from), elements(i));
      } else {
        value[i] = load_elements<Simd, Element>(from, v.column_stride, elements(i));
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      if (attended && (attended[key] >> row & 1) == 0) continue;
      const auto weight = Simd::set(weights[key * width + row]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sums[row][i] = Simd::fma(weight, value[i], sums[row][i]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    const auto factor = Simd::set(rescale[row]);
    for (int i = 0; i < kVectors; ++i) {
      auto* const to = output + row * value_dim + d + i * Simd::kLanes;
      const auto before = load_up_to<Simd>(to, elements(i));
      store_up_to<Simd>(to, Simd::fma(before, factor, sums[row][i]), elements(i));
    }
  }
}

// The same for whole rows of V.
template <class Simd, class Element, int kRows, bool kSideBySide>
void aggregate_rows(const RowPointers& v, int64_t keys, bool fetch,
                    const typename Simd::Scalar* weights, int64_t width, const uint64_t* attended,
                    int64_t value_dim, const typename Simd::Scalar* rescale,
                    typename Simd::Scalar* output) {
  int64_t d = 0;
  const auto add = [&](auto vectors, int64_t last) {
    add_values<Simd, Element, kRows, vectors.value, kSideBySide>(
        v, keys, fetch && d == 0, d, last, weights, width, attended, value_dim, rescale, output);
    d += (vectors.value - 1) * Simd::kLanes + last;
  };
  while (value_dim - d >= kValueVectors<Simd> * Simd::kLanes) {
    add(Constant<kValueVectors<Simd>>{}, Simd::kLanes);
  }
  const int64_t left = value_dim - d;
  if (left == 0) return;
  const int64_t last = left % Simd::kLanes;
  with_constant<kValueVectors<Simd>>((left + Simd::kLanes - 1) / Simd::kLanes, [&](auto vectors) {
    add(vectors, last == 0 ? int64_t{Simd::kLanes} : last);
  });
}

}  // namespace
}  // namespace numattn
