// Moving a tile between arrays in memory, of any strides, and the kernels' own layouts, in which
// the lanes of a vector are queries. An Element is what an array holds: the Scalar of the vectors,
// or a 16-bit float.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// The first `count` elements, or a whole vector if there are more; further lanes are 0.
template <class Simd, class Element>
auto load_up_to(const Element* from, int64_t count) {
  return count >= Simd::kLanes ? Simd::load(from) : Simd::load_first(from, count);
}

template <class Simd, class Element, class Vec>
void store_up_to(Element* to, Vec x, int64_t count) {
  if (count >= Simd::kLanes) {
    Simd::store(to, x);
  } else {
    Simd::store_first(to, x, count);
  }
}

// Up to a vector's length of elements, `stride` bytes apart; lanes from `count` on are 0.
template <class Simd, class Element>
typename Simd::Vec load_elements(const char* from, int64_t stride, int64_t count) {
  if (stride == static_cast<int64_t>(sizeof(Element))) {
    return load_up_to<Simd>(reinterpret_cast<const Element*>(from), count);
  }
  Element elements[Simd::kLanes] = {};
  for (int64_t i = 0; i < Simd::kLanes && i < count; ++i) {
    __builtin_memcpy(&elements[i], from + i * stride, sizeof(Element));
  }
  return Simd::load(elements);
}

template <class Simd, class Element>
void store_elements(char* to, int64_t stride, typename Simd::Vec x, int64_t count) {
  if (stride == static_cast<int64_t>(sizeof(Element))) {
    store_up_to<Simd>(reinterpret_cast<Element*>(to), x, count);
    return;
  }
  Element elements[Simd::kLanes];
  Simd::store(elements, x);
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(to + i * stride, &elements[i], sizeof(Element));
  }
}

// A square of kLanes rows and columns, transposed: result[column] has the rows in its lanes.
// Rows from `rows` on and columns from `columns` on are 0. Strides in bytes.
template <class Simd, class Element>
void load_transposed(const char* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                     int64_t columns, typename Simd::Vec (&result)[Simd::kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Simd::kLanes; ++i) {
    result[i] = i < rows
                    ? load_elements<Simd, Element>(from + i * row_stride, column_stride, columns)
                    : Simd::zero();
  }
  Simd::transpose(result);
}

// Fetches what lies below a square of kLanes rows: every row is a cache line of its own, far from
// the last one, which no hardware prefetcher expects. Worth 2 % at 512 tokens.
template <class Simd, bool kToWrite>
void fetch_next_rows(const char* square, int64_t row_stride) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < Simd::kLanes; ++i) {
    __builtin_prefetch(square + (Simd::kLanes + i) * row_stride, kToWrite, 3);
  }
}

// q [row][d] in memory becomes queries [unit of d][lane], times `sign`; lanes without a row are 0,
// and so is what the last unit has beyond head_dim.
template <class Simd, class Element, int kVectors>
void pack_queries(const char* q, int64_t row_stride, int64_t column_stride, int64_t rows,
                  int64_t head_dim, typename Simd::Scalar sign, typename Simd::Unit* queries) {
  constexpr int kPerUnit = Simd::kUnitElements;
  constexpr int kWidth = kVectors * Simd::kLanes;
  const auto factor = Simd::set(sign);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = static_cast<int64_t>(v) * Simd::kLanes;
    for (int64_t d = 0; d < head_dim; d += Simd::kLanes) {
      const int64_t columns = head_dim - d < Simd::kLanes ? head_dim - d : Simd::kLanes;
      typename Simd::Vec square[Simd::kLanes];
      const char* const from = q + row * row_stride + d * column_stride;
      fetch_next_rows<Simd, false>(from, row_stride);
      load_transposed<Simd, Element>(from, row_stride, column_stride, rows - row, columns, square);
      for (int64_t i = 0; i < columns; ++i) square[i] = Simd::mul(square[i], factor);
      for (int64_t i = 0; i < columns; i += kPerUnit) {
        Simd::store(queries + (d + i) / kPerUnit * kWidth + row, Simd::join(&square[i]));
      }
    }
  }
}

// output [d][lane], times factor [lane], becomes out [row][d] in memory.
template <class Simd, class Element, int kVectors, bool kFetch = true>
void unpack_output(const typename Simd::Scalar* output, const typename Simd::Scalar* factor,
                   int64_t rows, int64_t value_dim, char* out, int64_t row_stride,
                   int64_t column_stride) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  for (int64_t row = 0; row < rows; row += Simd::kLanes) {
    const auto row_factor = Simd::load(factor + row);
    const int64_t last = rows - row < Simd::kLanes ? rows - row : Simd::kLanes;
    for (int64_t d = 0; d < value_dim; d += Simd::kLanes) {
      const int64_t columns = value_dim - d < Simd::kLanes ? value_dim - d : Simd::kLanes;
      typename Simd::Vec square[Simd::kLanes];
      for (int64_t i = 0; i < Simd::kLanes; ++i) {
        square[i] = i < columns ? Simd::mul(Simd::load(output + (d + i) * kWidth + row), row_factor)
                                : Simd::zero();
      }
      Simd::transpose(square);
      char* const to = out + row * row_stride + d * column_stride;
      if (kFetch) fetch_next_rows<Simd, true>(to, row_stride);
      for (int64_t i = 0; i < last; ++i) {
        store_elements<Simd, Element>(to + i * row_stride, column_stride, square[i], columns);
      }
    }
  }
}

}  // namespace
}  // namespace numattn
