// The first and the third stage for so few queries that lanes over queries would stand empty:
// here the lanes are elements of a vector, and nothing is packed or transposed.
#pragma once

#include <cstdint>

#include "tile_io.h"

namespace numattn {
namespace {

// A tile of at most so many queries is computed this way: fewer than a whole tile has.
template <class Simd>
constexpr int kFewQueries = Simd::kTileVectors * Simd::kLanes > 4 ? 4 : 2;

// logits [key][lane] = K [key][d] . queries [row][d], for the first kRows lanes.
template <class Simd, int kRows, int kKeys, class Element>
void dot_products(const Element* k, int64_t k_stride, const typename Simd::Scalar* queries,
                  int64_t head_dim, typename Simd::Scalar* logits) {
  typename Simd::Vec sums[kKeys][kRows];
  for (int key = 0; key < kKeys; ++key) {
    for (int row = 0; row < kRows; ++row) sums[key][row] = Simd::zero();
  }
  for (int64_t d = 0; d < head_dim; d += Simd::kLanes) {
    typename Simd::Vec query[kRows];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      query[row] = load_up_to<Simd>(queries + row * head_dim + d, head_dim - d);
    }
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) {
      const auto piece = load_up_to<Simd>(k + key * k_stride + d, head_dim - d);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        sums[key][row] = Simd::fma(piece, query[row], sums[key][row]);
      }
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      logits[key * Simd::kLanes + row] = Simd::sum(sums[key][row]);
    }
  }
}

template <class Simd, int kRows, class Element>
void qk_few_queries(const Element* k, int64_t k_stride, const typename Simd::Scalar* queries,
                    int64_t keys, int64_t head_dim, typename Simd::Scalar* logits) {
  constexpr int kKeys = 4;
  int64_t key = 0;
  for (; key + kKeys <= keys; key += kKeys) {
    dot_products<Simd, kRows, kKeys>(k + key * k_stride, k_stride, queries, head_dim,
                                     logits + key * Simd::kLanes);
  }
  for (; key < keys; ++key) {
    dot_products<Simd, kRows, 1>(k + key * k_stride, k_stride, queries, head_dim,
                                 logits + key * Simd::kLanes);
  }
}

// output [row][d] = output * rescale [lane] + weights [key][lane] * V [key][d], for kVectors
// vectors of which the last one has `last` elements. attended [key] has the lanes that may read a
// key, or is null if all may: a weight of 0 would let a NaN through.
template <class Simd, int kRows, int kVectors, class Element>
void add_values(const Element* v, int64_t v_stride, int64_t last,
                const typename Simd::Scalar* weights, const uint64_t* attended, int64_t keys,
                int64_t value_dim, const typename Simd::Scalar* rescale,
                typename Simd::Scalar* output) {
  const auto elements = [&](int i) { return i == kVectors - 1 ? last : Simd::kLanes; };
  typename Simd::Vec sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVectors; ++i) sums[row][i] = Simd::zero();
  }
  for (int64_t key = 0; key < keys; ++key) {
    typename Simd::Vec value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      value[i] = load_up_to<Simd>(v + key * v_stride + i * Simd::kLanes, elements(i));
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      if (attended && (attended[key] >> row & 1) == 0) continue;
      const auto weight = Simd::set(weights[key * Simd::kLanes + row]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sums[row][i] = Simd::fma(weight, value[i], sums[row][i]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    const auto factor = Simd::set(rescale[row]);
    for (int i = 0; i < kVectors; ++i) {
      auto* const to = output + row * value_dim + i * Simd::kLanes;
      const auto before = load_up_to<Simd>(to, elements(i));
      store_up_to<Simd>(to, Simd::fma(before, factor, sums[row][i]), elements(i));
    }
  }
}

template <class Simd, int kRows, class Element>
void aggregate_few_queries(const Element* v, int64_t v_stride, const typename Simd::Scalar* weights,
                           const uint64_t* attended, int64_t keys, int64_t value_dim,
                           const typename Simd::Scalar* rescale, typename Simd::Scalar* output) {
  constexpr int kVectors = 4;
  constexpr int64_t kDims = int64_t{kVectors} * Simd::kLanes;
  int64_t d = 0;
  for (; d + kDims <= value_dim; d += kDims) {
    add_values<Simd, kRows, kVectors>(v + d, v_stride, Simd::kLanes, weights, attended, keys,
                                      value_dim, rescale, output + d);
  }
  for (; d < value_dim; d += Simd::kLanes) {
    const int64_t last = value_dim - d < Simd::kLanes ? value_dim - d : Simd::kLanes;
    add_values<Simd, kRows, 1>(v + d, v_stride, last, weights, attended, keys, value_dim, rescale,
                               output + d);
  }
}

}  // namespace
}  // namespace numattn
