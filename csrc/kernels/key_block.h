// A block of keys as the stages read it: where K and V lie in memory if that can be, or else copied
// into scratch. Copies are made once for a block and all the tiles that share it; whole arrays are
// never converted.
#pragma once

#include <cstdint>

#include "tile_io.h"

namespace numattn {
namespace {

// `stride` is in Items from row to row. A row is a key; for the values of a level with pairs it is
// a unit of keys.
template <class Item>
struct KeyBlock {
  const Item* data;
  int64_t stride;

  const Item* row(int64_t i) const { return data + i * stride; }
};

// Rows of K or V in memory: [key][d] of Elements, strides in bytes.
struct KeyRows {
  const char* data;
  int64_t row_stride, column_stride;
  int64_t dims;

  const char* row(int64_t key) const { return data + key * row_stride; }
};

// Items side by side and aligned, without a copy.
template <class Item>
bool is_in_place(const KeyRows& rows, int64_t item_elements) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Item));
  return rows.column_stride * item_elements == kSize && rows.row_stride % kSize == 0 &&
         rows.dims % item_elements == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % alignof(Item) == 0;
}
template <class Item>
KeyBlock<Item> in_place(const KeyRows& rows) {
  return {reinterpret_cast<const Item*>(rows.data),
          rows.row_stride / static_cast<int64_t>(sizeof(Item))};
}

// [key][d] of Elements, for the kernels that convert in registers. `copy` has room for all.
template <class Element>
KeyBlock<Element> element_block(const KeyRows& rows, int64_t keys, Element* copy) {
  if (is_in_place<Element>(rows, 1)) return in_place<Element>(rows);
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t d = 0; d < rows.dims; ++d) {
      __builtin_memcpy(copy + key * rows.dims + d, rows.row(key) + d * rows.column_stride,
                       sizeof(Element));
    }
  }
  return {copy, rows.dims};
}

// Rows of Elements become rows of Scalars.
template <class Simd, class Element>
void widen_rows(const KeyRows& rows, int64_t keys, typename Simd::Scalar* to) {
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t d = 0; d < rows.dims; d += Simd::kLanes) {
      const int64_t count = rows.dims - d < Simd::kLanes ? rows.dims - d : Simd::kLanes;
      const auto piece = load_elements<Simd, Element>(rows.row(key) + d * rows.column_stride,
                                                      rows.column_stride, count);
      store_up_to<Simd>(to + key * rows.dims + d, piece, count);
    }
  }
}

// K as the first stage reads it, [key][unit of d]; a last unit is filled up with 0.
template <class Simd, class Element>
KeyBlock<typename Simd::Unit> key_units(const KeyRows& rows, int64_t keys,
                                        typename Simd::Unit* copy) {
  using Unit = typename Simd::Unit;
  constexpr int kPerUnit = Simd::kUnitElements;
  if constexpr (sizeof(Element) * kPerUnit == sizeof(Unit)) {
    if (is_in_place<Unit>(rows, kPerUnit)) return in_place<Unit>(rows);
  }
  if constexpr (kPerUnit == 1) {
    widen_rows<Simd, Element>(rows, keys, copy);
    return {copy, rows.dims};
  } else {
    const int64_t units = (rows.dims + kPerUnit - 1) / kPerUnit;
    for (int64_t key = 0; key < keys; ++key) {
      auto* const to = reinterpret_cast<Element*>(copy + key * units);
      for (int64_t d = 0; d < units * kPerUnit; ++d) {
        Element element{};
        if (d < rows.dims) {
          __builtin_memcpy(&element, rows.row(key) + d * rows.column_stride, sizeof(Element));
        }
        __builtin_memcpy(to + d, &element, sizeof(Element));
      }
    }
    return {copy, units};
  }
}

// V as the third stage reads it, [unit of keys][d]; a last unit is filled up with 0.
template <class Simd, class Element>
KeyBlock<typename Simd::Unit> value_units(const KeyRows& rows, int64_t keys,
                                          typename Simd::Unit* copy) {
  constexpr int kPerUnit = Simd::kUnitElements;
  if constexpr (kPerUnit == 1) {
    return key_units<Simd, Element>(rows, keys, copy);
  } else {
    const bool side_by_side = rows.column_stride == static_cast<int64_t>(sizeof(Element));
    for (int64_t key = 0; key < keys; key += kPerUnit) {
      auto* const to = copy + key / kPerUnit * rows.dims;
      typename Simd::Vec pieces[kPerUnit];
      int64_t d = 0;
      if (side_by_side && key + kPerUnit <= keys) {
        for (; d + Simd::kLanes <= rows.dims; d += Simd::kLanes) {
          for (int i = 0; i < kPerUnit; ++i) {
            pieces[i] = Simd::load(reinterpret_cast<const Element*>(rows.row(key + i)) + d);
          }
          Simd::store(to + d, Simd::join(pieces));
        }
      }
      for (; d < rows.dims; d += Simd::kLanes) {
        const int64_t count = rows.dims - d < Simd::kLanes ? rows.dims - d : Simd::kLanes;
        for (int i = 0; i < kPerUnit; ++i) {
          pieces[i] = key + i < keys
                          ? load_elements<Simd, Element>(rows.row(key + i) + d * rows.column_stride,
                                                         rows.column_stride, count)
                          : Simd::zero();
        }
        store_up_to<Simd>(to + d, Simd::join(pieces), count);
      }
    }
    return {copy, rows.dims};
  }
}

// Whether no element is NaN or infinite.
template <class Simd>
bool is_finite(KeyBlock<typename Simd::Unit> values, int64_t units, int64_t dims) {
  for (int64_t unit = 0; unit < units; ++unit) {
    typename Simd::Vec nan_unless_finite = Simd::zero();
    for (int64_t d = 0; d < dims; d += Simd::kLanes) {
      const auto x = load_up_to<Simd>(values.row(unit) + d, dims - d);
      for (int i = 0; i < Simd::kUnitElements; ++i) {
        nan_unless_finite = Simd::fma(Simd::element(x, i), Simd::zero(), nan_unless_finite);
      }
    }
    if (Simd::bits_not_equal(nan_unless_finite, Simd::zero()) != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace numattn
