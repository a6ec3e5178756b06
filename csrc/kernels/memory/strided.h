// Loads and stores of arrays with any strides, and the transposes between them and the kernels'
// own layouts, in which the lanes of a vector are queries. An Element is what an array holds: the
// Scalar of the vectors, or a type of stored_types.h.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// The first `count` elements, or a whole vector if there are more; the other lanes are 0.
template <class Vectors, class Element>
auto load_up_to(const Element* from, int64_t count) {
  return count >= Vectors::kLanes ? Vectors::load(from) : Vectors::load_first(from, count);
}

template <class Vectors, class Element, class Vec>
void store_up_to(Element* to, Vec x, int64_t count) {
  if (count >= Vectors::kLanes) {
    Vectors::store(to, x);
  } else {
    Vectors::store_first(to, x, count);
  }
}

// Up to a vector's length of elements, `stride` bytes apart; lanes from `count` on are 0.
template <class Vectors, class Element>
typename Vectors::Vec load_elements(const char* from, int64_t stride, int64_t count) {
  if (stride == static_cast<int64_t>(sizeof(Element))) {
    return load_up_to<Vectors>(reinterpret_cast<const Element*>(from), count);
  }
  Element elements[Vectors::kLanes] = {};
  for (int64_t i = 0; i < Vectors::kLanes && i < count; ++i) {
    __builtin_memcpy(&elements[i], from + i * stride, sizeof(Element));
  }
  return Vectors::load(elements);
}

template <class Vectors, class Element>
void store_elements(char* to, int64_t stride, typename Vectors::Vec x, int64_t count) {
  if (stride == static_cast<int64_t>(sizeof(Element))) {
    store_up_to<Vectors>(reinterpret_cast<Element*>(to), x, count);
    return;
  }
  Element elements[Vectors::kLanes];
  Vectors::store(elements, x);
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(to + i * stride, &elements[i], sizeof(Element));
  }
}

// A square of kLanes rows and columns, transposed: result[column] has the rows in its lanes.
// Rows from `rows` on and columns from `columns` on are 0. Strides in bytes.
template <class Vectors, class Element>
void load_transposed(const char* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                     int64_t columns, typename Vectors::Vec (&result)[Vectors::kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Vectors::kLanes; ++i) {
    result[i] = i < rows
                    ? load_elements<Vectors, Element>(from + i * row_stride, column_stride, columns)
                    : Vectors::zero();
  }
  Vectors::transpose(result);
}

// Copies the rows of an array that is stored transposed to [row][d]. In the array, neighbouring
// rows are adjacent and the elements of a row are `column_stride` bytes apart. Copying element by
// element would take several times as long.
template <class Vectors, class Element, class To>
void copy_transposed(const char* from, int64_t column_stride, int64_t rows, int64_t dims, To* to,
                     int64_t to_stride) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Element));
  // Read a few d at a time, for all rows: reading all d at once would crowd a few sets of the
  // cache.
  for (int64_t d = 0; d < dims; d += Vectors::kLanes) {
    const int64_t columns = dims - d < Vectors::kLanes ? dims - d : Vectors::kLanes;
    for (int64_t row = 0; row < rows; row += Vectors::kLanes) {
      const int64_t count = rows - row < Vectors::kLanes ? rows - row : Vectors::kLanes;
      typename Vectors::Vec square[Vectors::kLanes];  // [d][row], then [row][d]
      load_transposed<Vectors, Element>(from + d * column_stride + row * kSize, column_stride,
                                        kSize, columns, count, square);
      for (int64_t i = 0; i < count; ++i) {
        store_up_to<Vectors>(to + (row + i) * to_stride + d, square[i], columns);
      }
    }
  }
}

// Prefetches the rows below a square of kLanes rows. Every row is in its own cache line, far from
// the previous one, which no hardware prefetcher expects. Worth 2 % at 512 tokens.
template <class Vectors, bool kToWrite>
void fetch_next_rows(const char* square, int64_t row_stride) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < Vectors::kLanes; ++i) {
    __builtin_prefetch(square + (Vectors::kLanes + i) * row_stride, kToWrite, 3);
  }
}

// q [row][d] in memory becomes queries [unit of d][lane], times `sign`; lanes without a row are 0,
// and so are the elements of the last unit beyond head_dim. Elements that are wider than a unit's
// elements are rounded.
template <class Units, class Element, int kVectors>
void pack_queries(const char* q, int64_t row_stride, int64_t column_stride, int64_t rows,
                  int64_t head_dim, typename Units::Scalar sign, typename Units::Unit* queries) {
  using Vectors = typename Units::Vectors;
  constexpr int kPerUnit = Units::kElements;
  constexpr bool kIsWider = sizeof(Element) * kPerUnit > sizeof(typename Units::Unit);
  constexpr int kWidth = kVectors * Vectors::kLanes;
  const auto factor = Vectors::set(sign);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = static_cast<int64_t>(v) * Vectors::kLanes;
    for (int64_t d = 0; d < head_dim; d += Vectors::kLanes) {
      const int64_t columns = head_dim - d < Vectors::kLanes ? head_dim - d : Vectors::kLanes;
      typename Vectors::Vec square[Vectors::kLanes];  // [d][row]
      const char* const from = q + row * row_stride + d * column_stride;
      fetch_next_rows<Vectors, false>(from, row_stride);
      load_transposed<Vectors, Element>(from, row_stride, column_stride, rows - row, columns,
                                        square);
      for (int64_t i = 0; i < columns; ++i) square[i] = Vectors::mul(square[i], factor);
      for (int64_t i = 0; i < columns; i += kPerUnit) {
        const auto unit = kIsWider ? Units::join_rounded(&square[i]) : Units::join(&square[i]);
        Units::store(queries + (d + i) / kPerUnit * kWidth + row, unit);
      }
    }
  }
}

// output [d][lane], times factor [lane], becomes out [row][d] in memory.
template <class Vectors, class Element, int kVectors, bool kFetch = true>
void unpack_output(const typename Vectors::Scalar* output, const typename Vectors::Scalar* factor,
                   int64_t rows, int64_t value_dim, char* out, int64_t row_stride,
                   int64_t column_stride) {
  constexpr int kWidth = kVectors * Vectors::kLanes;
  for (int64_t row = 0; row < rows; row += Vectors::kLanes) {
    const auto row_factor = Vectors::load(factor + row);
    const int64_t last = rows - row < Vectors::kLanes ? rows - row : Vectors::kLanes;
    for (int64_t d = 0; d < value_dim; d += Vectors::kLanes) {
      const int64_t columns = value_dim - d < Vectors::kLanes ? value_dim - d : Vectors::kLanes;
      typename Vectors::Vec square[Vectors::kLanes];
      for (int64_t i = 0; i < Vectors::kLanes; ++i) {
        square[i] = i < columns
                        ? Vectors::mul(Vectors::load(output + (d + i) * kWidth + row), row_factor)
                        : Vectors::zero();
      }
      Vectors::transpose(square);
      char* const to = out + row * row_stride + d * column_stride;
      if (kFetch) fetch_next_rows<Vectors, true>(to, row_stride);
      for (int64_t i = 0; i < last; ++i) {
        store_elements<Vectors, Element>(to + i * row_stride, column_stride, square[i], columns);
      }
    }
  }
}

}  // namespace
}  // namespace numattn
