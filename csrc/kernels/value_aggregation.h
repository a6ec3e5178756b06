// The third stage: a block's weighted values, added to a tile's output,
//   output [d][query lane] = output * rescale [query lane] + Vt [d][key] * weights [key][query lane].
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// One register tile: kDims elements of every row of V, read where they lie with one broadcast
// per (key, d), against kVectors vectors of queries. The block is summed by itself before it is
// added: the rounding error grows with the keys of a block plus the number of blocks, not with
// all keys.
template <class Simd, int kDims, int kVectors>
void value_register_tile(const typename Simd::Scalar* v, int64_t v_stride,
                         const typename Simd::Scalar* weights, int64_t keys,
                         const typename Simd::Scalar* rescale, typename Simd::Scalar* output) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  typename Simd::Vec sums[kDims][kVectors];
#pragma GCC unroll 8
  for (int d = 0; d < kDims; ++d) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sums[d][i] = Simd::zero();
  }
  for (int64_t key = 0; key < keys; ++key) {
    typename Simd::Vec weight[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      weight[i] = Simd::load(weights + key * kWidth + i * Simd::kLanes);
    }
#pragma GCC unroll 8
    for (int d = 0; d < kDims; ++d) {
      const auto element = Simd::set(v[key * v_stride + d]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sums[d][i] = Simd::fma(element, weight[i], sums[d][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const auto factor = Simd::load(rescale + i * Simd::kLanes);
#pragma GCC unroll 8
    for (int d = 0; d < kDims; ++d) {
      auto* const to = output + d * kWidth + i * Simd::kLanes;
      Simd::store(to, Simd::fma(Simd::load(to), factor, sums[d][i]));
    }
  }
}

template <class Simd, int kDims, int kVectors>
void value_last_dims(const typename Simd::Scalar* v, int64_t v_stride,
                     const typename Simd::Scalar* weights, int64_t keys, int64_t dims,
                     const typename Simd::Scalar* rescale, typename Simd::Scalar* output) {
  if constexpr (kDims > 0) {
    if (dims == kDims) {
      value_register_tile<Simd, kDims, kVectors>(v, v_stride, weights, keys, rescale, output);
    } else {
      value_last_dims<Simd, kDims - 1, kVectors>(v, v_stride, weights, keys, dims, rescale, output);
    }
  }
}

// v [key][d] with v_stride elements between keys; weights [key][lane]; rescale [lane];
// output [d][lane].
template <class Simd, int kVectors>
void value_aggregation(const typename Simd::Scalar* v, int64_t v_stride,
                       const typename Simd::Scalar* weights, int64_t keys, int64_t value_dim,
                       const typename Simd::Scalar* rescale, typename Simd::Scalar* output) {
  constexpr int kDims = Simd::broadcast_rows(kVectors);
  constexpr int kWidth = kVectors * Simd::kLanes;
  int64_t d = 0;
  for (; d + kDims <= value_dim; d += kDims) {
    value_register_tile<Simd, kDims, kVectors>(v + d, v_stride, weights, keys, rescale,
                                               output + d * kWidth);
  }
  value_last_dims<Simd, kDims - 1, kVectors>(v + d, v_stride, weights, keys, value_dim - d, rescale,
                                             output + d * kWidth);
}

}  // namespace
}  // namespace numattn
