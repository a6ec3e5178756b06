// The first and the third stage where the lanes are elements of a vector: for so few queries that
// lanes over queries would stand empty. K and V are read where they lie, each byte once, and
// widened in registers; nothing is packed or transposed. A row is a query of one head.
#pragma once

#include <cstdint>

#include "tile_io.h"

namespace numattn {
namespace {

// A group of at most so many rows goes through a row of K or V together.
template <class Simd>
constexpr int kRowsTogether = Simd::kLanes < 4 ? Simd::kLanes : 4;

constexpr int64_t kBytesPerLine = 64;

// Fetches the bytes of a row that will be read soon.
inline void fetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kBytesPerLine) __builtin_prefetch(row + i, 0, 3);
}

// All lanes of x[i] added up become lane i.
template <class Simd>
typename Simd::Vec sum_each(typename Simd::Vec (&x)[Simd::kLanes]) {
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
  const auto add = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
    typename Simd::Vec query[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      query[row] = load_up_to<Simd>(queries + row * head_dim + d, count);
    }
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      const auto piece = load(key, d, count);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        sums[key * kRows + row] = Simd::fma(piece, query[row], sums[key * kRows + row]);
      }
    }
  };
  int64_t d = 0;
  for (; d + Simd::kLanes <= head_dim; d += Simd::kLanes) add(d, Simd::kLanes);
  if (d < head_dim) add(d, head_dim - d);

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

// The same for `keys` keys. `next_rows` are rows to be fetched meanwhile, one for each key, of
// `next_bytes`; or null.
template <class Simd, class Element, int kRows, bool kSideBySide>
void qk_rows(const char* const* k_rows, int64_t keys, int64_t column_stride,
             const char* const* next_rows, int64_t next_bytes, const typename Simd::Scalar* queries,
             int64_t head_dim, int64_t width, typename Simd::Scalar* logits) {
  constexpr int kFit = Simd::kLanes / kRows;
  constexpr int kKeys = kFit < 8 ? kFit : 8;
  int64_t key = 0;
  for (; key + kKeys <= keys; key += kKeys) {
    for (int i = 0; next_rows && i < kKeys; ++i) fetch_row(next_rows[key + i], next_bytes);
    dot_products<Simd, Element, kRows, kKeys, kSideBySide>(k_rows + key, column_stride, queries,
                                                           head_dim, width, logits + key * width);
  }
  for (; key < keys; ++key) {
    if (next_rows) fetch_row(next_rows[key], next_bytes);
    dot_products<Simd, Element, kRows, 1, kSideBySide>(k_rows + key, column_stride, queries,
                                                       head_dim, width, logits + key * width);
  }
}

// output [row][d] = output * rescale [lane] + weights [key][lane] * V [key][d], for kVectors
// vectors from element d on, of which the last one has `last` elements; `width` lanes are a row of
// weights. attended [key] has the lanes that may read a key, or is null if all may: a weight of 0
// would let a NaN through.
template <class Simd, class Element, int kRows, int kVectors, bool kSideBySide>
void add_values(const char* const* v_rows, int64_t keys, int64_t column_stride, int64_t d,
                int64_t last, const typename Simd::Scalar* weights, int64_t width,
                const uint64_t* attended, int64_t value_dim, const typename Simd::Scalar* rescale,
                typename Simd::Scalar* output) {
  const auto elements = [&](int i) { return i == kVectors - 1 ? last : Simd::kLanes; };
  typename Simd::Vec sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) sums[row][i] = Simd::zero();
  }
  for (int64_t key = 0; key < keys; ++key) {
    typename Simd::Vec value[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const char* const from = v_rows[key] + (d + i * Simd::kLanes) * column_stride;
      if constexpr (kSideBySide) {
        value[i] = load_up_to<Simd>(reinterpret_cast<const Element*>(from), elements(i));
      } else {
        value[i] = load_elements<Simd, Element>(from, column_stride, elements(i));
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      if (attended && (attended[key] >> row & 1) == 0) continue;
      const auto weight = Simd::set(weights[key * width + row]);
#pragma GCC unroll 4
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

template <class Simd, class Element, int kRows, bool kSideBySide>
void aggregate_rows(const char* const* v_rows, int64_t keys, int64_t column_stride,
                    const typename Simd::Scalar* weights, int64_t width, const uint64_t* attended,
                    int64_t value_dim, const typename Simd::Scalar* rescale,
                    typename Simd::Scalar* output) {
  constexpr int kVectors = 4;
  constexpr int64_t kDims = int64_t{kVectors} * Simd::kLanes;
  int64_t d = 0;
  for (; d + kDims <= value_dim; d += kDims) {
    add_values<Simd, Element, kRows, kVectors, kSideBySide>(v_rows, keys, column_stride, d,
                                                            Simd::kLanes, weights, width, attended,
                                                            value_dim, rescale, output);
  }
  for (; d < value_dim; d += Simd::kLanes) {
    const int64_t last = value_dim - d < Simd::kLanes ? value_dim - d : Simd::kLanes;
    add_values<Simd, Element, kRows, 1, kSideBySide>(v_rows, keys, column_stride, d, last, weights,
                                                     width, attended, value_dim, rescale, output);
  }
}

}  // namespace
}  // namespace numattn
