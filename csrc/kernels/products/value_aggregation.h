// Value aggregation: adds a block's weighted values to a tile's output,
//   output [d][query lane] =
//       output * rescale [query lane] + Vt [d][key] * weights [key][query lane],
// where key counts units (simd/arithmetic.h).
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/products/by_lane.h"
#include "kernels/products/key_steps.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

template <class Units>
struct ValueOperands {
  const typename Units::Unit* v;  // [key][d]
  int64_t v_stride;
  const typename Units::Unit* weights;    // [key][lane]
  const typename Units::Scalar* rescale;  // [lane]
};

// Adds the keys of the steps from kFirst on to the sums of a register tile: kDims elements of
// every row of V, read in place with one broadcast per (key, d).
template <class Units, int kFirst, int kDims, int kVectors>
[[gnu::always_inline]] inline void sum_values(const ValueOperands<Units>& from,
                                              const KeySteps<kVectors>& steps,
                                              typename Units::Vec (&sums)[kDims][kVectors]) {
  using Vectors = typename Units::Vectors;
  constexpr int kWidth = kVectors * Vectors::kLanes;
  const int64_t begin = kFirst == 0 ? 0 : steps.ends[kFirst > 0 ? kFirst - 1 : 0];
#pragma GCC unroll 4
  for (int64_t key = begin; key < steps.ends[kFirst]; ++key) {
    typename Units::Units weight[kVectors];
#pragma GCC unroll 12
    for (int i = kFirst; i < kVectors; ++i) {
      weight[i] = Units::load(from.weights + key * kWidth + i * Vectors::kLanes);
    }
    const typename Units::Unit* const value = from.v + key * from.v_stride;
    if constexpr (kMultipliesByLane<Units>) {
      multiply_side_by_side<Units, kFirst>(value, weight, sums);
      continue;
    }
#pragma GCC unroll 12
    for (int d = 0; d < kDims; ++d) {
      const auto unit = Units::set(value[d]);
#pragma GCC unroll 12
      for (int i = kFirst; i < kVectors; ++i) {
        sums[d][i] = Units::multiply_add(unit, weight[i], sums[d][i]);
      }
    }
  }
  if constexpr (kFirst + 1 < kVectors) sum_values<Units, kFirst + 1>(from, steps, sums);
}

// The block is summed separately before it is added: the rounding error grows with the keys of a
// block plus the number of blocks, not with all keys.
template <class Units, int kDims, int kVectors>
[[gnu::always_inline]] inline void value_register_tile(const ValueOperands<Units>& from,
                                                       const KeySteps<kVectors>& steps,
                                                       typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  constexpr int kWidth = kVectors * Vectors::kLanes;
  typename Vectors::Vec sums[kDims][kVectors];
#pragma GCC unroll 12
  for (int d = 0; d < kDims; ++d) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) sums[d][i] = Vectors::zero();
  }
  sum_values<Units, 0>(from, steps, sums);
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) {
    const auto factor = Vectors::load(from.rescale + i * Vectors::kLanes);
#pragma GCC unroll 12
    for (int d = 0; d < kDims; ++d) {
      auto* const to = output + d * kWidth + i * Vectors::kLanes;
      Vectors::store(to, Vectors::fma(Vectors::load(to), factor, sums[d][i]));
    }
  }
}

template <class Units, int kDims, int kVectors>
void value_last_dims(const ValueOperands<Units>& from, const KeySteps<kVectors>& steps,
                     int64_t dims, typename Units::Scalar* output) {
  if constexpr (kDims > 0) {
    if (dims == kDims) {
      value_register_tile<Units, kDims>(from, steps, output);
    } else {
      value_last_dims<Units, kDims - 1>(from, steps, dims, output);
    }
  }
}

// output [d][lane]; the steps count units
template <class Units, int kVectors>
void value_aggregation(ValueOperands<Units> from, const KeySteps<kVectors>& steps,
                       int64_t value_dim, typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  constexpr int kDims = RegisterTile<Vectors>::scalars(kVectors);
  constexpr int kWidth = kVectors * Vectors::kLanes;
  for (; value_dim >= kDims; value_dim -= kDims) {
    value_register_tile<Units, kDims>(from, steps, output);
    from.v += kDims;
    output += kDims * kWidth;
  }
  value_last_dims<Units, kDims - 1>(from, steps, value_dim, output);
}

}  // namespace
}  // namespace numattn
