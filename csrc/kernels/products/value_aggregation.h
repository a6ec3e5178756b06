// The third stage: a block's weighted values, added to a tile's output,
//   output [d][query lane] = output * rescale [query lane] + Vt [d][key] * weights [key][query
//   lane],
// where key counts units: single keys, or pairs of keys in 16 bits (simd/scalar_units.h).
#pragma once

#include <cstdint>

#include "kernels/products/key_steps.h"

namespace numattn {
namespace {

template <class Simd>
struct ValueOperands {
  const typename Simd::Unit* v;  // [key][d]
  int64_t v_stride;
  const typename Simd::Unit* weights;    // [key][lane]
  const typename Simd::Scalar* rescale;  // [lane]
};

// Adds the keys of the steps from kFirst on to the sums of a register tile: kDims elements of
// every row of V, read where they lie with one broadcast per (key, d).
template <class Simd, int kFirst, int kDims, int kVectors>
[[gnu::always_inline]] inline void sum_values(const ValueOperands<Simd>& from,
                                              const KeySteps<kVectors>& steps,
                                              typename Simd::Vec (&sums)[kDims][kVectors]) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  const int64_t begin = kFirst == 0 ? 0 : steps.ends[kFirst > 0 ? kFirst - 1 : 0];
  for (int64_t key = begin; key < steps.ends[kFirst]; ++key) {
    typename Simd::Units weight[kVectors];
#pragma GCC unroll 12
    for (int i = kFirst; i < kVectors; ++i) {
      weight[i] = Simd::load(from.weights + key * kWidth + i * Simd::kLanes);
    }
#pragma GCC unroll 12
    for (int d = 0; d < kDims; ++d) {
      const auto unit = Simd::set(from.v[key * from.v_stride + d]);
#pragma GCC unroll 12
      for (int i = kFirst; i < kVectors; ++i) {
        sums[d][i] = Simd::multiply_add(unit, weight[i], sums[d][i]);
      }
    }
  }
  if constexpr (kFirst + 1 < kVectors) sum_values<Simd, kFirst + 1>(from, steps, sums);
}

// The block is summed by itself before it is added: the rounding error grows with the keys of a
// block plus the number of blocks, not with all keys.
template <class Simd, int kDims, int kVectors>
[[gnu::always_inline]] inline void value_register_tile(const ValueOperands<Simd>& from,
                                                       const KeySteps<kVectors>& steps,
                                                       typename Simd::Scalar* output) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  typename Simd::Vec sums[kDims][kVectors];
#pragma GCC unroll 12
  for (int d = 0; d < kDims; ++d) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) sums[d][i] = Simd::zero();
  }
  sum_values<Simd, 0>(from, steps, sums);
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) {
    const auto factor = Simd::load(from.rescale + i * Simd::kLanes);
#pragma GCC unroll 12
    for (int d = 0; d < kDims; ++d) {
      auto* const to = output + d * kWidth + i * Simd::kLanes;
      Simd::store(to, Simd::fma(Simd::load(to), factor, sums[d][i]));
    }
  }
}

template <class Simd, int kDims, int kVectors>
void value_last_dims(const ValueOperands<Simd>& from, const KeySteps<kVectors>& steps, int64_t dims,
                     typename Simd::Scalar* output) {
  if constexpr (kDims > 0) {
    if (dims == kDims) {
      value_register_tile<Simd, kDims>(from, steps, output);
    } else {
      value_last_dims<Simd, kDims - 1>(from, steps, dims, output);
    }
  }
}

// output [d][lane]; the steps count units
template <class Simd, int kVectors>
void value_aggregation(ValueOperands<Simd> from, const KeySteps<kVectors>& steps, int64_t value_dim,
                       typename Simd::Scalar* output) {
  constexpr int kDims = Simd::broadcast_rows(kVectors);
  constexpr int kWidth = kVectors * Simd::kLanes;
  for (; value_dim >= kDims; value_dim -= kDims) {
    value_register_tile<Simd, kDims>(from, steps, output);
    from.v += kDims;
    output += kDims * kWidth;
  }
  value_last_dims<Simd, kDims - 1>(from, steps, value_dim, output);
}

}  // namespace
}  // namespace numattn
