// out = x * weight + bias, perhaps rotated, for some rows and columns.
//
// The weight is packed one panel at a time. A panel is as deep as one sum and is cut into strips as
// wide as a register tile. A strip stays in the first-level cache while all rows pass it. For few
// rows packing does not pay: rows of the weight are then read in place, several at once, and added
// to rows of sums.
//
// Every element is summed in the same order, whatever the other rows and columns are: first pieces
// of kStepsPerSum steps, each summed separately, and then the bias. So a result has the same bits
// on its own and in a batch.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/products/matmul.h"
#include "kernels/products/row_products.h"
#include "kernels/rows.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct Projection {
  using Vectors = typename Arithmetic::Vectors;
  using Vec = typename Vectors::Vec;
  using Scalar = typename Vectors::Scalar;
  using Units = typename Arithmetic::QkUnits;
  using Unit = typename Units::Unit;
  static constexpr int kPerUnit = Units::kElements;
  static constexpr int kLanes = Vectors::kLanes;
  static constexpr int kVectors = RegisterTile<Vectors>::kVectors;
  static constexpr int kStrip = RegisterTile<Vectors>::kLanes;  // columns
  static constexpr int64_t kDepth = kStepsPerSum<Vectors>;      // units
  static constexpr auto kSize = static_cast<int64_t>(sizeof(Element));

  // The limits of a work item. Its rows share the packed weight, its columns share the copied rows.
  static constexpr int64_t kMaxRows = 768;
  static constexpr int64_t kMaxColumns = 6144 / sizeof(Scalar);
  // A block of rows stays in the second-level cache.
  static constexpr int64_t kRowsPerBlock = 192;

  // Few rows, for which packing would cost more than it saves: the most of a whole product, and the
  // most of a work item, which reads the weight in place.
  static constexpr int64_t kFewRows = 12, kStreamedRows = 8;

  static ProjectionLimits limits(int64_t rows, int64_t weight_column_stride) {
    if (rows > kFewRows || weight_column_stride != kSize) return {kMaxRows, kMaxColumns, false};
    // One row reads long pieces of the weight's rows. The sums of several rows have to stay in the
    // first-level cache.
    const int64_t together = rows < kStreamedRows ? rows : kStreamedRows;
    return {kStreamedRows, rows == 1 ? 4096 : 2048 / together, true};
  }

  struct Scratch {
    Unit* x;        // [row][unit]
    Unit* weight;   // [strip of columns][unit][column]
    Scalar* sums;   // [row][column]
    Scalar* piece;  // [row][column], what some steps add, for few rows
    int64_t bytes;
  };

  static Scratch lay_out(const ProjectionTask& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    Scratch scratch{};
    const int64_t sums = task.rows * padded(task.columns);
    const int64_t strips = (task.columns + kStrip - 1) / kStrip;
    arena.take(scratch.x, (task.rows < kRowsPerBlock ? task.rows : kRowsPerBlock) * kDepth);
    arena.take(scratch.weight, is_streamed(task) ? 0 : strips * strip_stride(kDepth));
    arena.take(scratch.sums, sums);
    arena.take(scratch.piece, is_streamed(task) ? sums : 0);
    scratch.bytes = arena.used;
    return scratch;
  }
  static int64_t scratch_bytes(const ProjectionTask& task) {
    ProjectionTask without_memory = task;
    without_memory.scratch = nullptr;
    return lay_out(without_memory).bytes;
  }

  // The number of sums from row to row.
  static int64_t padded(int64_t columns) {
    constexpr int kTogether = kLanes * kPerUnit;
    return (columns + kTogether - 1) / kTogether * kTogether;
  }
  static bool is_streamed(const ProjectionTask& task) {
    return task.rows <= kStreamedRows && task.weight.column_stride == kSize;
  }
  // Units from strip to strip. Strips do not all begin in the same set of the first-level cache.
  static int64_t strip_stride(int64_t units) {
    return units * kStrip + kCacheLine / static_cast<int64_t>(sizeof(Unit));
  }

  // False if it was stopped.
  static bool run(const ProjectionTask& task) {
    const Scratch scratch = lay_out(task);
    return is_streamed(task) ? stream_rows<kStreamedRows>(task, scratch)
                             : pack_and_multiply(task, scratch);
  }

  // ---- x and the weight as a product reads them -----------------------------------------------

  // How many elements `units` units have from `first` on.
  static int64_t elements_of(const ProjectionTask& task, int64_t first, int64_t units) {
    const int64_t left = task.depth - first * kPerUnit;
    return left < units * kPerUnit ? left : units * kPerUnit;
  }

  // Rows are too far apart for the hardware to fetch them in time.
  static void fetch_row(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(row + i, 0, 2);
  }

  // Copies x [row][unit] from row `row` and unit `first` on. Rows that are far apart are each on
  // their own page, and many of them share a few sets of the cache.
  static KeyBlock<Unit> copy_rows(const ProjectionTask& task, int64_t row, int64_t count,
                                  int64_t first, int64_t units, Unit* copy) {
    View view = task.x;
    view.data += row * view.row_stride + first * kPerUnit * view.column_stride;
    return k_block_copy<Units, Element>(
        {view, elements_of(task, first, units), false, {}, nullptr, 0, 0, 0}, 0, count, copy);
  }

  // Prefetches some rows of the next block while strip `strip` of `columns` is multiplied.
  static void fetch_rows(const ProjectionTask& task, int64_t row, int64_t strip, int64_t columns,
                         int64_t first, int64_t units) {
    if (task.x.column_stride != kSize) return;
    const int64_t each = (kRowsPerBlock * kStrip + columns - 1) / columns;
    const int64_t begin = row + strip / kStrip * each;
    for (int64_t i = begin; i < begin + each && i < task.rows; ++i) {
      fetch_row(task.x.data + i * task.x.row_stride + first * kPerUnit * kSize,
                units * kPerUnit * kSize);
    }
  }

  // Packs weight [strip of columns][unit][column] from unit `first` on; missing elements are 0.
  static void pack(const ProjectionTask& task, int64_t first, int64_t units, Unit* packed) {
    constexpr int kUnitsAhead = 6;
    const View& weight = task.weight;
    const char* const from = weight.data + first * kPerUnit * weight.row_stride;
    const int64_t depth = elements_of(task, first, units);
    if (weight.row_stride == kSize && weight.column_stride != kSize) {
      for (int64_t strip = 0; strip < task.columns; strip += kStrip) {
        const int64_t columns = task.columns - strip < kStrip ? task.columns - strip : kStrip;
        pack_queries<Units, Element, kVectors>(
            from + strip * weight.column_stride, weight.column_stride, kSize, columns, depth,
            Scalar{1}, packed + strip / kStrip * strip_stride(units));
      }
      return;
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      const char* const rows = from + unit * kPerUnit * weight.row_stride;
      for (int i = 0; i < kPerUnit; ++i) {
        fetch_row(rows + (kUnitsAhead * kPerUnit + i) * weight.row_stride, task.columns * kSize);
      }
      for (int64_t column = 0; column < task.columns; column += kLanes) {
        Vec elements[kPerUnit];
        for (int i = 0; i < kPerUnit; ++i) {
          elements[i] = unit * kPerUnit + i < depth
                            ? load_elements<Vectors, Element>(
                                  rows + i * weight.row_stride + column * weight.column_stride,
                                  weight.column_stride, task.columns - column)
                            : Vectors::zero();
        }
        Units::store(
            packed + column / kStrip * strip_stride(units) + unit * kStrip + column % kStrip,
            Units::join(elements));
      }
    }
  }

  // ---- many rows ------------------------------------------------------------------------------

  static bool pack_and_multiply(const ProjectionTask& task, const Scratch& scratch) {
    const int64_t units = units_of<Units>(task.depth);
    const int64_t stride = padded(task.columns);
    for (int64_t first = 0; first < units; first += kDepth) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t some = units - first < kDepth ? units - first : kDepth;
      pack(task, first, some, scratch.weight);
      for (int64_t row = 0; row < task.rows; row += kRowsPerBlock) {
        const int64_t left = task.rows - row;
        const int64_t count = left < kRowsPerBlock ? left : kRowsPerBlock;
        const KeyBlock<Unit> x = copy_rows(task, row, count, first, some, scratch.x);
        for (int64_t strip = 0; strip < task.columns; strip += kStrip) {
          const int64_t columns = (task.columns - strip + kLanes - 1) / kLanes * kLanes;
          fetch_rows(task, row + count, strip, task.columns, first, some);
          matmul<Scalars::by_row, Units>(
              {x.data, x.stride, scratch.weight + strip / kStrip * strip_stride(some), kStrip, some,
               scratch.sums + row * stride + strip, stride, first > 0},
              count, columns < kStrip ? columns : kStrip);
        }
        if (first + some == units) finish(task, scratch, row, count);
      }
    }
    return true;
  }

  // ---- few rows -------------------------------------------------------------------------------

  // piece [row][column] (+)= x [row][unit] * weight [unit][column], for kCount units, the last of
  // which may be incomplete.
  template <int kRows, int kCount>
  static void add_units(const KeyBlock<Unit>& x, const char* weight, int64_t row_stride,
                        int64_t elements, int64_t columns, bool add, Scalar* piece) {
    const int64_t stride = padded(columns);
    typename Units::Units scalars[kRows][kCount];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int unit = 0; unit < kCount; ++unit) scalars[row][unit] = Units::set(x.row(row)[unit]);
    }
    const auto add_columns = [&](int64_t column, int64_t count) __attribute__((always_inline)) {
      Vec sums[kRows][kPerUnit];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int i = 0; i < kPerUnit; ++i) {
          const Scalar* const from = piece + row * stride + column + i * kLanes;
          sums[row][i] = add ? Vectors::load(from) : Vectors::zero();
        }
      }
#pragma GCC unroll 8
      for (int unit = 0; unit < kCount; ++unit) {
        const auto row_of = [&](int i) {
          const int64_t element = unit * kPerUnit + i;
          return element < elements
                     ? reinterpret_cast<const Element*>(weight + element * row_stride) + column
                     : nullptr;
        };
        typename Units::Units of_unit[kPerUnit];
        load_values<Units, Element>(row_of(0), kPerUnit > 1 ? row_of(1) : nullptr, count, of_unit);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
          for (int i = 0; i < kPerUnit; ++i) {
            sums[row][i] = Units::multiply_add(scalars[row][unit], of_unit[i], sums[row][i]);
          }
        }
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int i = 0; i < kPerUnit; ++i) {
          Vectors::store(piece + row * stride + column + i * kLanes, sums[row][i]);
        }
      }
    };
    constexpr int kTogether = kLanes * kPerUnit;
    int64_t column = 0;
    for (; column + kTogether <= columns; column += kTogether) add_columns(column, kTogether);
    if (column < columns) add_columns(column, columns - column);
  }

  template <int kRows>
  static bool stream(const ProjectionTask& task, const Scratch& scratch) {
    constexpr int kTogether = 8;
    const int64_t row_stride = task.weight.row_stride;
    const int64_t all = units_of<Units>(task.depth);
    for (int64_t first = 0; first < all; first += kDepth) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t units = all - first < kDepth ? all - first : kDepth;
      KeyBlock<Unit> x = copy_rows(task, 0, kRows, first, units, scratch.x);
      Scalar* const piece = first == 0 ? scratch.sums : scratch.piece;
      const auto add = [&]<int kCount>(int64_t unit) {
        const int64_t element = (first + unit) * kPerUnit;
        add_units<kRows, kCount>({x.data + unit, x.stride}, task.weight.data + element * row_stride,
                                 row_stride, task.depth - element, task.columns, unit > 0, piece);
      };
      int64_t unit = 0;
      for (; unit + kTogether <= units; unit += kTogether) add.template operator()<kTogether>(unit);
      for (; unit < units; ++unit) add.template operator()<1>(unit);
      for (int64_t i = 0; first > 0 && i < kRows * padded(task.columns); i += kLanes) {
        Scalar* const to = scratch.sums + i;
        Vectors::store(to, Vectors::add(Vectors::load(to), Vectors::load(piece + i)));
      }
    }
    finish(task, scratch, 0, kRows);
    return true;
  }

  template <int kRows>
  static bool stream_rows(const ProjectionTask& task, const Scratch& scratch) {
    if constexpr (kRows > 0) {
      return task.rows == kRows ? stream<kRows>(task, scratch)
                                : stream_rows<kRows - 1>(task, scratch);
    }
    return false;
  }

  // ---- out ------------------------------------------------------------------------------------

  // Rows whose sums are complete become rows of out.
  static void finish(const ProjectionTask& task, const Scratch& scratch, int64_t first,
                     int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      Scalar* const sums = scratch.sums + row * padded(task.columns);
      if (task.bias) {
        const auto* const bias = reinterpret_cast<const Element*>(task.bias);
        for (int64_t column = 0; column < task.columns; column += kLanes) {
          const Vec of_column = load_up_to<Vectors>(bias + column, task.columns - column);
          Vectors::store(sums + column, Vectors::add(Vectors::load(sums + column), of_column));
        }
      }
      if (task.rotation.cos) rotate(task, row, sums);
      char* const to = task.out.data + row * task.out.row_stride;
      with_type_of_out<Element>(task.out_is_float32, [&]<class Type>(Stored<Type>) {
        for (int64_t column = 0; column < task.columns; column += kLanes) {
          const int64_t left = task.columns - column;
          store_elements<Vectors, Type>(to + column * task.out.column_stride,
                                        task.out.column_stride, Vectors::load(sums + column),
                                        left < kLanes ? left : kLanes);
        }
      });
    }
  }

  static void rotate(const ProjectionTask& task, int64_t row, Scalar* sums) {
    const HeadRotation& rotation = task.rotation;
    const int64_t angles = (task.first_row + row) % rotation.rows * rotation.row_stride;
    for (int64_t head = 0; head < task.columns; head += rotation.head_dim) {
      const View vector{reinterpret_cast<char*>(sums + head), 0, 0, sizeof(Scalar)};
      Rows<Vectors, Scalar>::rotate({vector, vector, rotation.cos + angles, rotation.sin + angles,
                                     0, 1, rotation.head_dim, rotation.rotary_dim,
                                     rotation.interleaved});
    }
  }
};

}  // namespace
}  // namespace numattn
