// The product of any two matrices, of which the other products are special cases,
//   to [row][column] (+)= scalars [row][step] * vectors [step][column],
// by register tiles: one scalar at a time, read in place, times vectors along the columns. Steps
// count units (simd/arithmetic.h). Unlike in qk_matmul.h and value_aggregation.h, all strides are
// run-time numbers, and columns need not fill a vector.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/memory/strided.h"
#include "kernels/products/by_lane.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

// Long sums are made of pieces, so that the rounding error does not grow with their length.
template <class Vectors>
constexpr int64_t kStepsPerSum = Vectors::kFusedMultiplyAdd ? 256 : 32;

// Whether the scalars of a row are adjacent in memory, or the scalars of a step.
enum class Scalars { by_row, by_step };

// Strides are in units or scalars. Each step of `vectors` has whole vectors, the last of which may
// be padded. Each row of `to` has `columns` elements and no padding.
template <class Units>
struct MatmulOperands {
  using Unit = typename Units::Unit;
  using Scalar = typename Units::Scalar;
  const Unit* scalars;  // [row][step], or [step][row]
  int64_t scalars_stride;
  const Unit* vectors;  // [step][column]
  int64_t vectors_stride;
  int64_t steps;
  Scalar* to;  // [row][column]
  int64_t to_stride;
  bool add;  // to what `to` holds, instead of replacing it
};

// kRows rows times kVectors vectors, the last of which may be cut off by `columns`.
template <class Units, Scalars kOrder, int kRows, int kVectors>
[[gnu::always_inline]] inline void matmul_register_tile(const MatmulOperands<Units>& from,
                                                        int64_t columns) {
  using Vectors = typename Units::Vectors;
  constexpr int kLanes = Vectors::kLanes;
  const auto* const scalars = from.scalars;
  const auto* vectors = from.vectors;
  const int64_t scalars_stride = from.scalars_stride;
  const int64_t vectors_stride = from.vectors_stride;
  typename Vectors::Vec sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) sums[row][i] = Vectors::zero();
  }
  if (from.add) {  // fetched while the products are computed
    for (int row = 0; row < kRows; ++row) __builtin_prefetch(from.to + row * from.to_stride, 1);
  }
  const auto* of_step = scalars;  // if they are by_step
  int64_t step = 0;
  if constexpr (kMultipliesByLane<Units> && kOrder == Scalars::by_row) {
    for (; step + kLanes <= from.steps; step += kLanes) {
      multiply_steps<Units>(scalars + step, scalars_stride, vectors, vectors_stride, sums);
      vectors += kLanes * vectors_stride;
    }
  }
#pragma GCC unroll 8
  for (; step < from.steps; ++step) {
    typename Units::Units vector[kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) vector[i] = Units::load(vectors + i * kLanes);
    vectors += vectors_stride;
    if constexpr (kMultipliesByLane<Units> && kOrder == Scalars::by_step) {
      multiply_side_by_side<Units, 0>(of_step, vector, sums);
      of_step += scalars_stride;
      continue;
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const auto scalar = Units::set(
          kOrder == Scalars::by_row ? scalars[row * scalars_stride + step] : of_step[row]);
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        sums[row][i] = Units::multiply_add(scalar, vector[i], sums[row][i]);
      }
    }
    if (kOrder == Scalars::by_step) of_step += scalars_stride;
  }
  const int64_t to_stride = from.to_stride;
  auto* to = from.to;
  const auto write = [&](auto add, int64_t of_last) {
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        auto* const at = to + i * kLanes;
        const int64_t count = i + 1 < kVectors ? kLanes : of_last;
        if constexpr (add.value) {
          sums[row][i] = Vectors::add(load_up_to<Vectors>(at, count), sums[row][i]);
        }
        store_up_to<Vectors>(at, sums[row][i], count);
      }
      to += to_stride;
    }
  };
  const int64_t of_last = columns - (kVectors - 1) * kLanes;
  const auto write_all = [&](auto add) {
    of_last >= kLanes ? write(add, kLanes) : write(add, of_last);
  };
  from.add ? write_all(Constant<1>{}) : write_all(Constant<0>{});
}

template <class Units, Scalars kOrder, int kRows, int kVectors>
void matmul_last_columns(const MatmulOperands<Units>& from, int64_t columns) {
  if constexpr (kVectors > 0) {
    if (columns > (kVectors - 1) * Units::Vectors::kLanes) {
      matmul_register_tile<Units, kOrder, kRows, kVectors>(from, columns);
    } else {
      matmul_last_columns<Units, kOrder, kRows, kVectors - 1>(from, columns);
    }
  }
}

template <class Units, Scalars kOrder, int kRows>
void matmul_rows(MatmulOperands<Units> from, int64_t columns) {
  using Vectors = typename Units::Vectors;
  constexpr int kColumns = RegisterTile<Vectors>::kLanes;
  for (; columns > 0; columns -= kColumns) {
    matmul_last_columns<Units, kOrder, kRows, RegisterTile<Vectors>::kVectors>(from, columns);
    from.vectors += kColumns;
    from.to += kColumns;
  }
}

template <class Units, Scalars kOrder, int kRows>
void matmul_last_rows(const MatmulOperands<Units>& from, int64_t rows, int64_t columns) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      matmul_rows<Units, kOrder, kRows>(from, columns);
    } else {
      matmul_last_rows<Units, kOrder, kRows - 1>(from, rows, columns);
    }
  }
}

template <Scalars kOrder, class Units>
void matmul(MatmulOperands<Units> from, int64_t rows, int64_t columns) {
  using Vectors = typename Units::Vectors;
  constexpr int kRows = RegisterTile<Vectors>::scalars(RegisterTile<Vectors>::kVectors);
  constexpr int64_t kSteps = kStepsPerSum<Vectors>;
  const int64_t step_stride = kOrder == Scalars::by_row ? 1 : from.scalars_stride;
  const int64_t row_stride = kOrder == Scalars::by_row ? from.scalars_stride : 1;
  for (int64_t left = from.steps; left > 0; left -= kSteps) {
    from.steps = left < kSteps ? left : kSteps;
    MatmulOperands<Units> band = from;
    int64_t rows_left = rows;
    for (; rows_left >= kRows; rows_left -= kRows) {
      matmul_rows<Units, kOrder, kRows>(band, columns);
      band.scalars += kRows * row_stride;
      band.to += kRows * band.to_stride;
    }
    matmul_last_rows<Units, kOrder, kRows - 1>(band, rows_left, columns);
    from.scalars += kSteps * step_stride;
    from.vectors += kSteps * from.vectors_stride;
    from.add = true;
  }
}

}  // namespace
}  // namespace numattn
