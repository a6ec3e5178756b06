// Products of a register tile for CPUs with an instruction that multiplies a vector by one lane of
// another (NEON). Adjacent scalars are then loaded as a vector: broadcasts would take a third of
// the loads and, on many CPUs, the time of a multiply-add each.
#pragma once

#include <cstdint>

#include "kernels/constant.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

template <class Units>
constexpr bool kMultipliesByLane = requires(typename Units::Units x, typename Units::Vec sum) {
  Units::template multiply_add_lane<0>(x, x, sum);
};

// sums [scalar][i] += scalars [scalar] * vectors [i] for i from kFirst on; the scalars are
// adjacent.
template <class Units, int kFirst, int kScalars, int kVectors>
[[gnu::always_inline]] inline void multiply_side_by_side(
    const typename Units::Unit* scalars, const typename Units::Units (&vectors)[kVectors],
    typename Units::Vec (&sums)[kScalars][kVectors]) {
  constexpr int kLanes = Units::Vectors::kLanes;
  constexpr int kGroups = (kScalars + kLanes - 1) / kLanes;
  for_constants<0, kGroups>([&](auto group) __attribute__((always_inline)) {
    constexpr int kBegin = group.value * kLanes;
    constexpr int kCount = kScalars - kBegin < kLanes ? kScalars - kBegin : kLanes;
    const auto lanes = kCount == kLanes ? Units::load(scalars + kBegin)
                                        : Units::load_first(scalars + kBegin, kCount);
    for_constants<0, kCount>([&](auto lane) __attribute__((always_inline)) {
      auto& sums_of_scalar = sums[kBegin + lane.value];
#pragma GCC unroll 12
      for (int i = kFirst; i < kVectors; ++i) {
        sums_of_scalar[i] =
            Units::template multiply_add_lane<lane.value>(lanes, vectors[i], sums_of_scalar[i]);
      }
    });
  });
}

// sums [scalar][i] += scalars [scalar][step] * vectors [step][i] for as many steps as vectors have
// lanes; the steps of a scalar are adjacent.
template <class Units, int kScalars, int kVectors>
[[gnu::always_inline]] inline void multiply_steps(const typename Units::Unit* scalars,
                                                  int64_t scalars_stride,
                                                  const typename Units::Unit* vectors,
                                                  int64_t vectors_stride,
                                                  typename Units::Vec (&sums)[kScalars][kVectors]) {
  constexpr int kLanes = Units::Vectors::kLanes;
  typename Units::Units of_scalar[kScalars];
#pragma GCC unroll 12
  for (int n = 0; n < kScalars; ++n) of_scalar[n] = Units::load(scalars + n * scalars_stride);
  // One vector at a time: sums and scalars leave only two registers.
  for_constants<0, kLanes>([&](auto step) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) {
      const auto vector = Units::load(vectors + step.value * vectors_stride + i * kLanes);
#pragma GCC unroll 12
      for (int n = 0; n < kScalars; ++n) {
        sums[n][i] =
            Units::template multiply_add_lane<step.value>(of_scalar[n], vector, sums[n][i]);
      }
    }
  });
}

}  // namespace
}  // namespace numattn
