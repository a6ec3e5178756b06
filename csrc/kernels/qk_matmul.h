// The first stage: the logits of a block of keys and a tile of queries,
//   logits [key][query lane] = K [key][d] * Qt [d][query lane].
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// One register tile: kKeys rows of K, read where they lie with one broadcast per (key, d),
// against kVectors vectors of queries.
template <class Simd, int kKeys, int kVectors>
void qk_register_tile(const typename Simd::Scalar* k, int64_t k_stride,
                      const typename Simd::Scalar* queries, int64_t dims, bool add,
                      typename Simd::Scalar* logits) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  typename Simd::Vec sums[kKeys][kVectors];
#pragma GCC unroll 8
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[key][v] = Simd::zero();
  }
  for (int64_t d = 0; d < dims; ++d) {
    typename Simd::Vec query[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      query[v] = Simd::load(queries + d * kWidth + v * Simd::kLanes);
    }
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) {
      const auto element = Simd::set(k[key * k_stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[key][v] = Simd::fma(element, query[v], sums[key][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      auto* const to = logits + key * kWidth + v * Simd::kLanes;
      Simd::store(to, add ? Simd::add(Simd::load(to), sums[key][v]) : sums[key][v]);
    }
  }
}

template <class Simd, int kKeys, int kVectors>
void qk_last_keys(const typename Simd::Scalar* k, int64_t k_stride,
                  const typename Simd::Scalar* queries, int64_t keys, int64_t dims, bool add,
                  typename Simd::Scalar* logits) {
  if constexpr (kKeys > 0) {
    if (keys == kKeys) {
      qk_register_tile<Simd, kKeys, kVectors>(k, k_stride, queries, dims, add, logits);
    } else {
      qk_last_keys<Simd, kKeys - 1, kVectors>(k, k_stride, queries, keys, dims, add, logits);
    }
  }
}

// k [key][d] with k_stride elements between keys; queries [d][lane]; logits [key][lane],
// not yet scaled.
template <class Simd, int kVectors>
void qk_matmul(const typename Simd::Scalar* k, int64_t k_stride,
               const typename Simd::Scalar* queries, int64_t keys, int64_t head_dim,
               typename Simd::Scalar* logits) {
  constexpr int kKeys = Simd::broadcast_rows(kVectors);
  constexpr int kWidth = kVectors * Simd::kLanes;
  // Long vectors are summed in pieces, so that the rounding error doesn't grow with all of them.
  constexpr int64_t kDimsPerSum = Simd::kFusedMultiplyAdd ? 192 : 32;
  for (int64_t d = 0; d < head_dim; d += kDimsPerSum) {
    const int64_t dims = head_dim - d < kDimsPerSum ? head_dim - d : kDimsPerSum;
    int64_t key = 0;
    for (; key + kKeys <= keys; key += kKeys) {
      qk_register_tile<Simd, kKeys, kVectors>(k + key * k_stride + d, k_stride,
                                              queries + d * kWidth, dims, d > 0,
                                              logits + key * kWidth);
    }
    qk_last_keys<Simd, kKeys - 1, kVectors>(k + key * k_stride + d, k_stride, queries + d * kWidth,
                                            keys - key, dims, d > 0, logits + key * kWidth);
  }
}

}  // namespace
}  // namespace numattn
