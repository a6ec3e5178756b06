// The first and the third stage where the lanes are elements of a vector: for so few queries that
// lanes over queries would stand empty. K and V are read where they lie, each byte once, and
// widened or paired in registers; nothing is packed or transposed. A row is a query of one head.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/key_rows.h"
#include "kernels/memory/strided.h"

namespace numattn {
namespace {

// Rows that go through K or V together: as many as leave registers for the sums.
template <class Simd>
constexpr int kRowsTogether = Simd::kLanes < 4 ? Simd::kLanes : 4;

// `kStep` elements are what one multiply_add takes of each vector.
template <class Simd>
constexpr int kStep = Simd::kLanes * Simd::kUnitElements;

// All lanes of x[i] added up become lane i.
template <class Simd>
typename Simd::Vec sum_each(typename Simd::Vec (&x)[Simd::kLanes]) {
  if constexpr (requires { Simd::sum_each(x); }) return Simd::sum_each(x);
  Simd::transpose(x);
#pragma GCC unroll 5
  for (int width = Simd::kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) x[i] = Simd::add(x[i], x[i + width]);
  }
  return x[0];
}

// `count` elements from `from` on, or kStep if there are more, as units; what is missing is 0.
template <class Simd, class Stored>
typename Simd::Units load_units(const Stored* from, int64_t count) {
  if constexpr (Simd::kUnitElements == 1) {
    return load_up_to<Simd>(from, count);
  } else {
    return Simd::load_units(from, count < kStep<Simd> ? count : kStep<Simd>);
  }
}

// products [key][row] = K [key][d] . queries [row][d], for kKeys keys and kRows rows, in lanes.
template <class Simd, class Stored, int kRows, int kKeys>
typename Simd::Vec dot_products(const char* const* k_rows,
                                const typename Simd::UnitElement* queries, int64_t head_dim) {
  static_assert(kRows * kKeys <= Simd::kLanes);
  // Two keys share the loads of the queries; more would read too many rows at a time.
  constexpr int kTogether = kKeys % 2 == 0 ? 2 : 1;
  typename Simd::Vec sums[Simd::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Simd::kLanes; ++i) sums[i] = Simd::zero();
#pragma GCC unroll 8
  for (int first = 0; first < kKeys; first += kTogether) {
    const auto add = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      typename Simd::Units key[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        key[i] = load_units<Simd>(reinterpret_cast<const Stored*>(k_rows[first + i]) + d, count);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const auto query = load_units<Simd>(queries + row * head_dim + d, count);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          auto& sum = sums[(first + i) * kRows + row];
          sum = Simd::multiply_add(key[i], query, sum);
        }
      }
    };
    int64_t d = 0;
    for (; d + kStep<Simd> <= head_dim; d += kStep<Simd>) add(d, kStep<Simd>);
    if (d < head_dim) add(d, head_dim - d);
  }
  return sum_each<Simd>(sums);
}

// logits [key][row] = K [key][d] . queries [row][d] for `keys` keys and kRows rows; a key's logits
// are `width` apart from the next one's.
template <class Simd, class Stored, int kRows>
void qk_rows(const char* const* k_rows, int64_t keys, FetchAhead& fetch_ahead,
             const typename Simd::UnitElement* queries, int64_t head_dim, int64_t width,
             typename Simd::Scalar* logits) {
  constexpr int kKeys = Simd::kLanes / kRows;
  using Scalar = typename Simd::Scalar;
  FetchAhead fetch = fetch_ahead;
  const auto multiply = [&](int64_t key, auto together) {
    fetch.next(together.value);
    const auto products =
        dot_products<Simd, Stored, kRows, together.value>(k_rows + key, queries, head_dim);
    if (width == kRows) {
      store_up_to<Simd>(logits + key * kRows, products, together.value * kRows);
      return;
    }
    Scalar lanes[Simd::kLanes];
    Simd::store(lanes, products);
#pragma GCC unroll 16
    for (int i = 0; i < together.value; ++i) {
      __builtin_memcpy(logits + (key + i) * width, lanes + i * kRows, kRows * sizeof(Scalar));
    }
  };
  int64_t key = 0;
  for (; key + kKeys <= keys; key += kKeys) multiply(key, Constant<kKeys>{});
  for (; key < keys; ++key) multiply(key, Constant<1>{});
  fetch_ahead = fetch;
}

// A unit of V's rows from `key` on, whose elements [0, count) are those of `vectors` vectors; the
// last unit may have one row less.
template <class Simd, class Stored, int kVectors>
void load_values(const char* const* v_rows, bool is_whole, int64_t d, int64_t count,
                 typename Simd::Units (&values)[kVectors]) {
  const auto* const first = reinterpret_cast<const Stored*>(v_rows[0]) + d;
  if constexpr (Simd::kUnitElements == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      values[i] = load_up_to<Simd>(first + i * Simd::kLanes, count - i * Simd::kLanes);
    }
  } else {
    const auto* const second = reinterpret_cast<const Stored*>(v_rows[is_whole ? 1 : 0]) + d;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += 2) {
      const int64_t at = i * Simd::kLanes;
      const int64_t left = count - at < kStep<Simd> ? count - at : kStep<Simd>;
      typename Simd::Units pair[2];
      Simd::load_rows(first + at, left, second + at, is_whole ? left : 0, pair);
      values[i] = pair[0];
      if (i + 1 < kVectors) values[i + 1] = pair[1];
    }
  }
}

// Which rows' weights of a unit of keys count: attended [key] has a bit for each row, or is null if
// all do. A weight of 0 is not enough where a value is NaN or infinite.
template <int kUnitElements>
unsigned attended_elements(const uint64_t* attended, int64_t key, int64_t keys, int64_t row) {
  if (!attended) return (1u << kUnitElements) - 1;
  unsigned bits = 0;
  for (int i = 0; i < kUnitElements && key + i < keys; ++i) {
    bits |= static_cast<unsigned>(attended[key + i] >> row & 1) << i;
  }
  return bits;
}

// Sums over keys that come in several pieces, where several heads take turns: [row][d] in between.
// That makes the bits those of one piece.
template <class Scalar>
struct Carry {
  Scalar* sums;  // unused if there is one piece
  bool begins, ends;
};

// output [row][d] = output * rescale [row] + weights [unit of keys][row] * V [key][d], for kVectors
// vectors from element d on, which have `elements` elements; `width` rows are from unit to unit.
// kIsPlain: nothing is masked, and the vectors are full.
template <class Simd, class Stored, int kRows, int kVectors, bool kIsPlain>
[[gnu::noinline]] void add_values(const char* const* v_rows, int64_t keys, FetchAhead& fetch_ahead,
                                  int64_t d, int64_t elements, const typename Simd::Unit* weights,
                                  int64_t width, const uint64_t* attended, int64_t first_row,
                                  int64_t value_dim, const typename Simd::Scalar* rescale,
                                  Carry<typename Simd::Scalar> carry,
                                  typename Simd::Scalar* output) {
  constexpr int kPerUnit = Simd::kUnitElements;
  constexpr unsigned kAll = (1u << kPerUnit) - 1;
  const int64_t count = kIsPlain ? kVectors * Simd::kLanes : elements;
  FetchAhead fetch = fetch_ahead;  // so that the compiler has it in registers
  typename Simd::Vec sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = d + i * Simd::kLanes;
      sums[row][i] = carry.begins ? Simd::zero()
                                  : load_up_to<Simd>(carry.sums + row * value_dim + at,
                                                     count - i * Simd::kLanes);
    }
  }
  const typename Simd::Unit* weight = weights;
  const auto add = [&](int64_t key, auto whole) __attribute__((always_inline)) {
    fetch.next(kPerUnit);
    typename Simd::Units values[kVectors];
    load_values<Simd, Stored>(v_rows + key, whole.value == 1, d, count, values);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const auto factor = Simd::set(weight[row]);
      const unsigned here =
          kIsPlain ? kAll : attended_elements<kPerUnit>(attended, key, keys, first_row + row);
      if (here == 0) continue;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const auto value = here == kAll ? values[i] : Simd::only(values[i], here);
        sums[row][i] = Simd::multiply_add(factor, value, sums[row][i]);
      }
    }
    weight += width;
  };
  int64_t key = 0;
  for (; key + kPerUnit <= keys; key += kPerUnit) add(key, Constant<1>{});
  if (kPerUnit > 1 && key < keys) add(key, Constant<0>{});
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const auto factor = Simd::set(rescale[row]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = count - i * Simd::kLanes;
      const int64_t at = row * value_dim + d + i * Simd::kLanes;
      if (!carry.ends) {
        store_up_to<Simd>(carry.sums + at, sums[row][i], left);
        continue;
      }
      auto* const to = output + at;
      store_up_to<Simd>(to, Simd::fma(load_up_to<Simd>(to, left), factor, sums[row][i]), left);
    }
  }
  fetch_ahead = fetch;
}

// How often add_values goes through a block of V.
template <class Simd>
int64_t value_passes(int64_t rows, int64_t value_dim) {
  constexpr int kElements = Simd::kTileVectors * Simd::kLanes;
  return (rows + kRowsTogether<Simd> - 1) / kRowsTogether<Simd> *
         ((value_dim + kElements - 1) / kElements);
}

// The same for whole rows of V.
template <class Simd, class Stored, int kRows>
void aggregate_rows(const char* const* v_rows, int64_t keys, FetchAhead& fetch,
                    const typename Simd::Unit* weights, int64_t width, const uint64_t* attended,
                    int64_t first_row, int64_t value_dim, const typename Simd::Scalar* rescale,
                    Carry<typename Simd::Scalar> carry, typename Simd::Scalar* output) {
  constexpr int kMost = Simd::kTileVectors * Simd::kLanes;
  for (int64_t d = 0; d < value_dim; d += kMost) {
    const int64_t count = value_dim - d < kMost ? value_dim - d : kMost;
    if (count == kMost && !attended) {
      add_values<Simd, Stored, kRows, Simd::kTileVectors, true>(v_rows, keys, fetch, d, count,
                                                                weights, width, nullptr, first_row,
                                                                value_dim, rescale, carry, output);
      continue;
    }
    with_constant<Simd::kTileVectors>((count + Simd::kLanes - 1) / Simd::kLanes, [&](auto vectors) {
      add_values<Simd, Stored, kRows, vectors.value, false>(v_rows, keys, fetch, d, count, weights,
                                                            width, attended, first_row, value_dim,
                                                            rescale, carry, output);
    });
  }
}

}  // namespace
}  // namespace numattn
