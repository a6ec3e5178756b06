// A block of keys as the stages read it: where K and V lie in memory if that can be, or else copied
// into scratch. Copies are made once for a block and all the tiles that share it; whole arrays are
// never converted.
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"
#include "kernels/memory/strided.h"
#include "kernels/table.h"

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

template <class Simd>
constexpr int64_t units_of(int64_t elements) {
  return (elements + Simd::kUnitElements - 1) / Simd::kUnitElements;
}

inline const char* key_row(const KeyRows& rows, int64_t key) {
  if (!rows.pages) return rows.data + key * rows.row_stride;
  return rows.data + rows.pages[key / rows.page_size] * rows.page_stride +
         key % rows.page_size * rows.row_stride;
}
inline float key_scale(const KeyRows& rows, int64_t key) {
  const char* from = rows.scales;
  if (rows.pages) {
    from += rows.pages[key / rows.page_size] * rows.scale_page_stride;
    key %= rows.page_size;
  }
  float scale;
  __builtin_memcpy(&scale, from + key * rows.scale_row_stride, sizeof(scale));
  return scale;
}

// Items side by side and aligned, without a copy.
template <class Item>
bool is_in_place(const KeyRows& rows, int64_t item_elements) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Item));
  return !rows.pages && rows.column_stride * item_elements == kSize &&
         rows.row_stride % kSize == 0 && rows.dims % item_elements == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % alignof(Item) == 0;
}
template <class Item>
KeyBlock<Item> in_place(const KeyRows& rows, int64_t first) {
  return {reinterpret_cast<const Item*>(key_row(rows, first)),
          rows.row_stride / static_cast<int64_t>(sizeof(Item))};
}

// K as the first stage reads it, [key][unit of d]; a last unit is filled up with 0. Elements of 8
// bits are not multiplied by their scale: the logits are.
template <class Simd, class Element>
KeyBlock<typename Simd::Unit> key_units(const KeyRows& rows, int64_t first, int64_t keys,
                                        typename Simd::Unit* copy) {
  using Unit = typename Simd::Unit;
  constexpr int kPerUnit = Simd::kUnitElements;
  if constexpr (sizeof(Element) * kPerUnit == sizeof(Unit)) {
    if (is_in_place<Unit>(rows, kPerUnit)) return in_place<Unit>(rows, first);
  }
  const int64_t units = units_of<Simd>(rows.dims);
  for (int64_t key = 0; key < keys; ++key) {
    const char* const from = key_row(rows, first + key);
    auto* const to = copy + key * units;
    if constexpr (kPerUnit == 1) {
      for (int64_t d = 0; d < rows.dims; d += Simd::kLanes) {
        const int64_t count = rows.dims - d < Simd::kLanes ? rows.dims - d : Simd::kLanes;
        store_up_to<Simd>(
            to + d,
            load_elements<Simd, Element>(from + d * rows.column_stride, rows.column_stride, count),
            count);
      }
    } else {
      for (int64_t d = 0; d < units * kPerUnit; ++d) {
        Element element{};
        if (d < rows.dims) {
          __builtin_memcpy(&element, from + d * rows.column_stride, sizeof(Element));
        }
        set_element(to[d / kPerUnit], static_cast<int>(d % kPerUnit), element);
      }
    }
  }
  return {copy, units};
}

// V as the third stage reads it, [unit of keys][d]; a last unit is filled up with 0. Elements of 8
// bits are multiplied by their scale, and rounded to what a unit holds.
template <class Simd, class Element>
KeyBlock<typename Simd::Unit> value_units(const KeyRows& rows, int64_t first, int64_t keys,
                                          typename Simd::Unit* copy) {
  using Single = typename Simd::Single;
  using Unit = typename Simd::Unit;
  constexpr int kPerUnit = Simd::kUnitElements;
  if constexpr (kPerUnit == 1 && sizeof(Element) == sizeof(Unit)) {
    if (is_in_place<Unit>(rows, 1)) return in_place<Unit>(rows, first);
  }
  for (int64_t key = 0; key < keys; key += kPerUnit) {
    const char* from[kPerUnit];
    typename Simd::Vec scale[kPerUnit];
    for (int i = 0; i < kPerUnit; ++i) {
      from[i] = key + i < keys ? key_row(rows, first + key + i) : nullptr;
      scale[i] = Single::set(rows.scales && from[i] ? key_scale(rows, first + key + i) : 1);
    }
    auto* const to = copy + key / kPerUnit * rows.dims;
    for (int64_t d = 0; d < rows.dims; d += Simd::kLanes) {
      const int64_t count = rows.dims - d < Simd::kLanes ? rows.dims - d : Simd::kLanes;
      typename Simd::Vec pieces[kPerUnit];
      for (int i = 0; i < kPerUnit; ++i) {
        pieces[i] = from[i] ? load_elements<Simd, Element>(from[i] + d * rows.column_stride,
                                                           rows.column_stride, count)
                            : Simd::zero();
      }
      if (!rows.scales) {
        store_up_to<Simd>(to + d, Simd::join(pieces), count);
        continue;
      }
      for (int i = 0; i < kPerUnit; ++i) pieces[i] = Single::mul(pieces[i], scale[i]);
      store_up_to<Simd>(to + d, Simd::join_rounded(pieces), count);
    }
  }
  return {copy, rows.dims};
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
