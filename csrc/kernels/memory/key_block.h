// A block of keys as the products read it: K and V in place if possible, otherwise copied into
// scratch. A block is copied once for all tiles that share it; whole arrays are never converted.
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"
#include "kernels/memory/strided.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/overflow.h"
#include "kernels/task.h"

namespace numattn {
namespace {

// `stride` counts Units from row to row. A row is a key of K, or a unit of keys of V.
template <class Unit>
struct KeyBlock {
  const Unit* data;
  int64_t stride;

  const Unit* row(int64_t i) const { return data + i * stride; }
};

inline const char* key_row(const KeyRows& keys, int64_t key) {
  const View& rows = keys.rows;
  if (!keys.pages) return rows.data + key * rows.row_stride;
  return rows.data + keys.pages[key / keys.page_size] * keys.page_stride +
         key % keys.page_size * rows.row_stride;
}
inline float key_scale(const KeyRows& keys, int64_t key) {
  const char* from = keys.scales.data;
  if (keys.pages) {
    from += keys.pages[key / keys.page_size] * keys.scale_page_stride;
    key %= keys.page_size;
  }
  float scale;
  __builtin_memcpy(&scale, from + key * keys.scales.row_stride, sizeof(scale));
  return scale;
}

// Whether units can be read in place: without gaps, aligned, not in pages.
template <class Unit>
bool is_in_place(const KeyRows& keys, int64_t unit_elements) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Unit));
  return !keys.pages && keys.rows.column_stride * unit_elements == kSize &&
         keys.rows.row_stride % kSize == 0 && keys.dims % unit_elements == 0 &&
         reinterpret_cast<uintptr_t>(keys.rows.data) % alignof(Unit) == 0;
}
// Whether neighbouring rows are adjacent in memory and the elements of a row are not.
template <class Element>
bool is_transposed(const KeyRows& keys) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Element));
  return !keys.pages && keys.rows.row_stride == kSize && keys.rows.column_stride != kSize;
}
template <class Unit>
KeyBlock<Unit> in_place(const KeyRows& keys, int64_t first) {
  return {reinterpret_cast<const Unit*>(key_row(keys, first)),
          keys.rows.row_stride / static_cast<int64_t>(sizeof(Unit))};
}

// [key][unit of d], copied.
template <class Units, class Element>
KeyBlock<typename Units::Unit> k_block_copy(const KeyRows& keys, int64_t first, int64_t count,
                                            typename Units::Unit* copy) {
  using Vectors = typename Units::Vectors;
  constexpr int kPerUnit = Units::kElements;
  const int64_t stride = keys.rows.column_stride;
  const int64_t units = units_of<Units>(keys.dims);
  if constexpr (kPerUnit == 1) {
    if (is_transposed<Element>(keys)) {
      copy_transposed<Vectors, Element>(key_row(keys, first), stride, count, keys.dims, copy,
                                        units);
      return {copy, units};
    }
  }
  for (int64_t key = 0; key < count; ++key) {
    const char* const from = key_row(keys, first + key);
    auto* const to = copy + key * units;
    if constexpr (kPerUnit == 1) {
      for (int64_t d = 0; d < keys.dims; d += Vectors::kLanes) {
        const int64_t left = keys.dims - d < Vectors::kLanes ? keys.dims - d : Vectors::kLanes;
        store_up_to<Vectors>(
            to + d, load_elements<Vectors, Element>(from + d * stride, stride, left), left);
      }
    } else {
      for (int64_t d = 0; d < units * kPerUnit; ++d) {
        Element element{};
        if (d < keys.dims) __builtin_memcpy(&element, from + d * stride, sizeof(Element));
        set_element(to[d / kPerUnit], static_cast<int>(d % kPerUnit), element);
      }
    }
  }
  return {copy, units};
}

template <class Units, class Element>
KeyBlock<typename Units::Unit> k_block_of(const KeyRows& keys, int64_t first, int64_t count,
                                          typename Units::Unit* copy) {
  using Unit = typename Units::Unit;
  if constexpr (sizeof(Element) * Units::kElements == sizeof(Unit)) {
    if (is_in_place<Unit>(keys, Units::kElements)) return in_place<Unit>(keys, first);
  }
  return k_block_copy<Units, Element>(keys, first, count, copy);
}

// K as QK^T reads it, [key][unit of d]; the last unit is padded with 0. 8-bit elements are not
// multiplied by their scale here; their logits are, later.
template <class Units, class Element>
KeyBlock<typename Units::Unit> k_block(const KeyRows& keys, int64_t first, int64_t count,
                                       typename Units::Unit* copy) {
  return with_stored_type<Int8, Element>(keys.is_int8, [&]<class Type>(Stored<Type>) {
    return k_block_of<Units, Type>(keys, first, count, copy);
  });
}

template <class Units, class Element>
KeyBlock<typename Units::Unit> v_block_of(const KeyRows& keys, int64_t first, int64_t count,
                                          typename Units::Unit* copy) {
  using Vectors = typename Units::Vectors;
  using Unit = typename Units::Unit;
  constexpr int kPerUnit = Units::kElements;
  if constexpr (kPerUnit == 1 && sizeof(Element) == sizeof(Unit)) {
    if (is_in_place<Unit>(keys, 1)) return in_place<Unit>(keys, first);
  }
  const int64_t stride = keys.rows.column_stride;
  if constexpr (kPerUnit == 1) {
    if (is_transposed<Element>(keys) && !keys.scales.data) {
      copy_transposed<Vectors, Element>(key_row(keys, first), stride, count, keys.dims, copy,
                                        keys.dims);
      return {copy, keys.dims};
    }
  }
  for (int64_t key = 0; key < count; key += kPerUnit) {
    const char* from[kPerUnit];
    typename Vectors::Vec scale[kPerUnit];
    for (int i = 0; i < kPerUnit; ++i) {
      from[i] = key + i < count ? key_row(keys, first + key + i) : nullptr;
      scale[i] = Vectors::set(keys.scales.data && from[i] ? key_scale(keys, first + key + i) : 1);
    }
    auto* const to = copy + key / kPerUnit * keys.dims;
    for (int64_t d = 0; d < keys.dims; d += Vectors::kLanes) {
      const int64_t left = keys.dims - d < Vectors::kLanes ? keys.dims - d : Vectors::kLanes;
      typename Vectors::Vec elements[kPerUnit];  // of each key
      for (int i = 0; i < kPerUnit; ++i) {
        elements[i] = from[i] ? load_elements<Vectors, Element>(from[i] + d * stride, stride, left)
                              : Vectors::zero();
      }
      if (!keys.scales.data) {
        store_up_to<Units>(to + d, Units::join(elements), left);
        continue;
      }
      for (int i = 0; i < kPerUnit; ++i) elements[i] = Vectors::mul(elements[i], scale[i]);
      store_up_to<Units>(to + d, Units::join_rounded(elements), left);
    }
  }
  return {copy, keys.dims};
}

// V as the value aggregation reads it, [unit of keys][d]; the last unit is padded with 0. 8-bit
// elements are multiplied by their scale and rounded to the unit's type.
template <class Units, class Element>
KeyBlock<typename Units::Unit> v_block(const KeyRows& keys, int64_t first, int64_t count,
                                       typename Units::Unit* copy) {
  return with_stored_type<Int8, Element>(keys.is_int8, [&]<class Type>(Stored<Type>) {
    return v_block_of<Units, Type>(keys, first, count, copy);
  });
}

// Whether no element is NaN or infinite.
template <class Units>
bool is_finite(KeyBlock<typename Units::Unit> values, int64_t units, int64_t dims) {
  using Vectors = typename Units::Vectors;
  for (int64_t unit = 0; unit < units; ++unit) {
    FiniteCheck<Vectors> check;
    for (int64_t d = 0; d < dims; d += Vectors::kLanes) {
      const auto x = load_up_to<Units>(values.row(unit) + d, dims - d);
      for (int i = 0; i < Units::kElements; ++i) check.add(Units::element(x, i));
    }
    if (!check.all_finite()) return false;
  }
  return true;
}

}  // namespace
}  // namespace numattn
