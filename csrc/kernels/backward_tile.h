// A query tile of the backward pass: what the five products read of Q and dO, and what the softmax
// and the row sums need.
#pragma once

#include <cstdint>

#include "kernels/memory/arena.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/overflow.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct BackwardTile {
  using Vectors = typename Arithmetic::Vectors;
  using Vec = typename Vectors::Vec;
  using Scalar = typename Vectors::Scalar;
  using QkUnits = typename Arithmetic::QkUnits;  // of the first two products, along d
  using QkUnit = typename QkUnits::Unit;
  // Of the other products: along queries for dV and dK, along keys for dQ.
  using Units = typename Arithmetic::ValueUnits;
  using Unit = typename Units::Unit;
  static constexpr int kPerUnit = Units::kElements;
  static constexpr int kLanes = Vectors::kLanes;
  // Wider than the register tile: the last three products have a step for each query, and load and
  // store dK and dV once per tile.
  static constexpr int kVectors = 256 / static_cast<int>(sizeof(Vec));
  static constexpr int kMaxQueries = kVectors * kLanes;

  QueryRows rows;
  QkUnit* queries;  // [unit of d][lane], negated if the scale is negative
  QkUnit* douts;    // [unit of d][lane]
  Unit* q_rows;     // [unit of queries][d], 0 in place of NaN and infinity
  Unit* do_rows;    // the same
  // [lane], what the softmax subtracts, as the sum of two numbers. Rounding it to one would scale
  // all weights of a row, because they are not divided by their sum again.
  Scalar *base, *base_rest;
  Scalar* row_sum;  // [lane], of dO * O, without dlse
  bool* douts_are_finite;

  // The length of a row in whole vectors, padded with 0.
  static int64_t padded(int64_t dims) { return (dims + kLanes - 1) / kLanes * kLanes; }

  // `rows` is set.
  void lay_out(Arena& arena, int64_t head_dim, int64_t value_dim) {
    arena.take(queries, units_of<QkUnits>(head_dim) * kMaxQueries);
    arena.take(douts, units_of<QkUnits>(value_dim) * kMaxQueries);
    arena.take(q_rows, units_of<Units>(kMaxQueries) * padded(head_dim));
    arena.take(do_rows, units_of<Units>(kMaxQueries) * padded(value_dim));
    arena.take(base, kMaxQueries);
    arena.take(base_rest, kMaxQueries);
    arena.take(row_sum, kMaxQueries);
    arena.take(douts_are_finite, 1);
  }

  void begin(const GradientTask& task) const {
    with_stored_type<float, Element>(task.out_is_float32, [&]<class OfOut>(Stored<OfOut>) {
      with_stored_type<float, Element>(task.dout_is_float32, [&]<class OfDout>(Stored<OfDout>) {
        begin_with<OfOut, OfDout>(task);
      });
    });
  }

  // Copies rows as vectors [unit of rows][d], with 0 in place of NaN and infinity, because 0 * NaN
  // would be NaN for masked pairs. The last unit is padded with 0. Returns whether all elements are
  // finite.
  template <class Type>
  static bool copy_rows(const View& view, int64_t rows, int64_t dims, Unit* to) {
    FiniteCheck<Vectors> check;
    for (int64_t row = 0; row < rows; row += kPerUnit, to += padded(dims)) {
      for (int64_t d = 0; d < dims; d += kLanes) {
        Vec elements[kPerUnit];  // of each row
        for (int i = 0; i < kPerUnit; ++i) {
          const char* const from = view.data + (row + i) * view.row_stride + d * view.column_stride;
          const Vec x = row + i < rows
                            ? load_elements<Vectors, Type>(from, view.column_stride, dims - d)
                            : Vectors::zero();
          check.add(x);
          elements[i] = finite(x);
        }
        Units::store(to + d, Units::join_rounded(elements));
      }
    }
    return check.all_finite();
  }

 private:
  static Vec finite(Vec x) {
    return Vectors::select_equal(Vectors::sub(x, x), Vectors::zero(), x, Vectors::zero());
  }

  // The sum of dO * O over a row.
  template <class OfOut, class OfDout>
  static Scalar product_of_rows(const char* out, int64_t out_stride, const char* dout,
                                int64_t dout_stride, int64_t dims) {
    Vec sum = Vectors::zero();
    for (int64_t d = 0; d < dims; d += kLanes) {
      const Vec a = load_elements<Vectors, OfOut>(out + d * out_stride, out_stride, dims - d);
      const Vec b = load_elements<Vectors, OfDout>(dout + d * dout_stride, dout_stride, dims - d);
      sum = Vectors::fma(a, b, sum);
    }
    return Vectors::sum(sum);
  }

  static Scalar scalar_at(const View& view, int64_t query) {
    Scalar x;
    __builtin_memcpy(&x, view.data + query * view.row_stride, sizeof(x));
    return x;
  }

  template <class OfOut, class OfDout>
  void begin_with(const GradientTask& task) const {
    const auto rows_of = [&](View view) {
      view.data += rows.first_query * view.row_stride;
      return view;
    };
    const View q = rows_of(task.q), out = rows_of(task.out), dout = rows_of(task.dout);
    const int64_t count = rows.queries;
    pack_queries<QkUnits, Element, kVectors>(q.data, q.row_stride, q.column_stride, count,
                                             task.head_dim, static_cast<Scalar>(query_sign(task)),
                                             queries);
    pack_queries<QkUnits, OfDout, kVectors>(dout.data, dout.row_stride, dout.column_stride, count,
                                            task.value_dim, 1, douts);
    copy_rows<Element>(q, count, task.head_dim, q_rows);
    *douts_are_finite = copy_rows<OfDout>(dout, count, task.value_dim, do_rows);
    for (int64_t i = 0; i < kMaxQueries; ++i) base[i] = base_rest[i] = row_sum[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = rows.first_query + i;
      const Scalar lse = scalar_at(task.lse, query);
      if (!is_minus_infinity(lse)) {
        const double quotient = lse / softmax_scale(task);
        base[i] = static_cast<Scalar>(quotient);
        base_rest[i] = static_cast<Scalar>(quotient - base[i]);
      }
      row_sum[i] = product_of_rows<OfOut, OfDout>(out.data + i * out.row_stride, out.column_stride,
                                                  dout.data + i * dout.row_stride,
                                                  dout.column_stride, task.value_dim);
      if (task.dlse.data) row_sum[i] -= scalar_at(task.dlse, query);
    }
  }
};

}  // namespace
}  // namespace numattn
