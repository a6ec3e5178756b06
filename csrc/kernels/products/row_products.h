// The two products for so few queries that lanes over queries would be mostly empty: the lanes are
// elements of a vector. K and V are read in place, each byte once, and widened or paired in
// registers; nothing is packed or transposed. A row is a query of one head.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/memory/key_rows.h"
#include "kernels/memory/strided.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

// Rows that go through K or V together: as many as leave registers for the sums.
template <class Vectors>
constexpr int kRowsTogether = Vectors::kLanes < 4 ? Vectors::kLanes : 4;

// Elements of a vector that one multiply_add takes.
template <class Units>
constexpr int kStep = Units::Vectors::kLanes * Units::kElements;

// All lanes of x[i] added up become lane i.
template <class Vectors>
typename Vectors::Vec sum_each(typename Vectors::Vec (&x)[Vectors::kLanes]) {
  if constexpr (requires { Vectors::sum_each(x); }) return Vectors::sum_each(x);
  Vectors::transpose(x);
#pragma GCC unroll 5
  for (int width = Vectors::kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) x[i] = Vectors::add(x[i], x[i + width]);
  }
  return x[0];
}

// products [key][row] = K [key][d] . queries [row][d], for kKeys keys and kRows rows, in lanes.
template <class Units, class Type, int kRows, int kKeys>
typename Units::Vec dot_products(const char* const* k_rows, const typename Units::Element* queries,
                                 int64_t head_dim) {
  using Vectors = typename Units::Vectors;
  static_assert(kRows * kKeys <= Vectors::kLanes);
  // Two keys share the loads of the queries; more would read too many rows at a time.
  constexpr int kTogether = kKeys % 2 == 0 ? 2 : 1;
  typename Units::Vec sums[Vectors::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Vectors::kLanes; ++i) sums[i] = Vectors::zero();
#pragma GCC unroll 8
  for (int first = 0; first < kKeys; first += kTogether) {
    const auto add = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      typename Units::Units key[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        key[i] = Units::load_units(reinterpret_cast<const Type*>(k_rows[first + i]) + d, count);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const auto query = Units::load_units(queries + row * head_dim + d, count);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          auto& sum = sums[(first + i) * kRows + row];
          sum = Units::multiply_add(key[i], query, sum);
        }
      }
    };
    int64_t d = 0;
    for (; d + kStep<Units> <= head_dim; d += kStep<Units>) add(d, kStep<Units>);
    if (d < head_dim) add(d, head_dim - d);
  }
  return sum_each<Vectors>(sums);
}

// logits [key][row] = K [key][d] . queries [row][d] for `keys` keys and kRows rows; logits are
// `width` apart from key to key.
template <class Units, class Type, int kRows>
void qk_rows(const char* const* k_rows, int64_t keys, FetchAhead& fetch_ahead,
             const typename Units::Element* queries, int64_t head_dim, int64_t width,
             typename Units::Scalar* logits) {
  using Vectors = typename Units::Vectors;
  constexpr int kKeys = Vectors::kLanes / kRows;
  using Scalar = typename Units::Scalar;
  FetchAhead fetch = fetch_ahead;
  const auto multiply = [&](int64_t key, auto together) {
    fetch.next(together.value);
    const auto products =
        dot_products<Units, Type, kRows, together.value>(k_rows + key, queries, head_dim);
    if (width == kRows) {
      store_up_to<Vectors>(logits + key * kRows, products, together.value * kRows);
      return;
    }
    Scalar lanes[Vectors::kLanes];
    Vectors::store(lanes, products);
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

// A unit of V's rows, elements [d, d + count) of each, as kVectors vectors. Unless it is whole, the
// unit is the last one and has one row less.
template <class Units, class Type, int kVectors>
void load_values(const char* const* v_rows, bool is_whole, int64_t d, int64_t count,
                 typename Units::Units (&values)[kVectors]) {
  using Vectors = typename Units::Vectors;
  const auto* first = reinterpret_cast<const Type*>(v_rows[0]) + d;
  // One address for all vectors: the compiler would keep an offset for each of them, on the stack.
  __asm__("" : "+r"(first));
  if constexpr (Units::kElements == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      values[i] = load_up_to<Vectors>(first + i * Vectors::kLanes, count - i * Vectors::kLanes);
    }
  } else {
    static_assert(Units::kElements == 2);
    const auto* const second = reinterpret_cast<const Type*>(v_rows[is_whole ? 1 : 0]) + d;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += 2) {
      const int64_t at = i * Vectors::kLanes;
      const int64_t left = count - at < kStep<Units> ? count - at : kStep<Units>;
      typename Units::Units pair[2];
      Units::load_rows(first + at, left, second + at, is_whole ? left : 0, pair);
      values[i] = pair[0];
      if (i + 1 < kVectors) values[i + 1] = pair[1];
    }
  }
}

// Which elements of a unit of keys a row attends to: attended [key] has a bit for each row, or is
// null if all rows attend. A weight of 0 is not enough where a value is NaN or infinite.
template <int kPerUnit>
unsigned attended_elements(const uint64_t* attended, int64_t key, int64_t keys, int64_t row) {
  if (!attended) return (1u << kPerUnit) - 1;
  unsigned bits = 0;
  for (int i = 0; i < kPerUnit && key + i < keys; ++i) {
    bits |= static_cast<unsigned>(attended[key + i] >> row & 1) << i;
  }
  return bits;
}

// Sums over keys that are interrupted where several heads take turns: [row][d] in between. The bits
// are the same as without a break.
template <class Scalar>
struct Carry {
  Scalar* sums;  // unused if the sum begins and ends in one turn
  bool begins, ends;
};

// output [row][d] = output * rescale [row] + weights [unit of keys][row] * V [key][d], for kVectors
// vectors from element d on, which have `elements` elements; weights are `width` apart from unit to
// unit. kIsPlain: nothing is masked, and the vectors are full.
template <class Units, class Type, int kRows, int kVectors, bool kIsPlain>
[[gnu::noinline]] void add_values(const char* const* v_rows, int64_t keys, FetchAhead& fetch_ahead,
                                  int64_t d, int64_t elements, const typename Units::Unit* weights,
                                  int64_t width, const uint64_t* attended, int64_t first_row,
                                  int64_t value_dim, const typename Units::Scalar* rescale,
                                  Carry<typename Units::Scalar> carry,
                                  typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  constexpr int kPerUnit = Units::kElements;
  constexpr unsigned kAll = (1u << kPerUnit) - 1;
  const int64_t count = kIsPlain ? kVectors * Vectors::kLanes : elements;
  FetchAhead fetch = fetch_ahead;  // so that the compiler has it in registers
  typename Units::Vec sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = d + i * Vectors::kLanes;
      sums[row][i] = carry.begins ? Vectors::zero()
                                  : load_up_to<Vectors>(carry.sums + row * value_dim + at,
                                                        count - i * Vectors::kLanes);
    }
  }
  const typename Units::Unit* weight = weights;
  const auto add = [&](int64_t key, auto whole) __attribute__((always_inline)) {
    fetch.next(kPerUnit);
    typename Units::Units values[kVectors];
    load_values<Units, Type>(v_rows + key, whole.value == 1, d, count, values);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const auto factor = Units::set(weight[row]);
      const unsigned here =
          kIsPlain ? kAll : attended_elements<kPerUnit>(attended, key, keys, first_row + row);
      if (here == 0) continue;
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        const auto value = here == kAll ? values[i] : Units::only(values[i], here);
        sums[row][i] = Units::multiply_add(factor, value, sums[row][i]);
      }
    }
    weight += width;
  };
  int64_t key = 0;
  for (; key + kPerUnit <= keys; key += kPerUnit) add(key, Constant<1>{});
  if (kPerUnit > 1 && key < keys) add(key, Constant<0>{});
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const auto factor = Vectors::set(rescale[row]);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = count - i * Vectors::kLanes;
      const int64_t at = row * value_dim + d + i * Vectors::kLanes;
      if (!carry.ends) {
        store_up_to<Vectors>(carry.sums + at, sums[row][i], left);
        continue;
      }
      auto* const to = output + at;
      store_up_to<Vectors>(to, Vectors::fma(load_up_to<Vectors>(to, left), factor, sums[row][i]),
                           left);
    }
  }
  fetch_ahead = fetch;
}

// Vectors of V that add_values takes from a key at a time: the fewer rows, the more vectors have
// registers for their sums. One row with two vectors takes 1.5 times as long as with eight (Zen 3).
template <class Vectors>
constexpr int value_vectors(int rows) {
  const int together = Vectors::kRegisters / 2 / rows / 2 * 2;  // units may come in pairs
  return together > RegisterTile<Vectors>::kVectors ? together : RegisterTile<Vectors>::kVectors;
}

// How often add_values goes through a block of V.
template <class Units>
int64_t value_passes(int64_t rows, int64_t value_dim) {
  using Vectors = typename Units::Vectors;
  int64_t passes = 0;
  for (int64_t row = 0; row < rows; row += kRowsTogether<Vectors>) {
    const int64_t left = rows - row;
    const int together =
        left < kRowsTogether<Vectors> ? static_cast<int>(left) : kRowsTogether<Vectors>;
    const int64_t elements = value_vectors<Vectors>(together) * Vectors::kLanes;
    passes += (value_dim + elements - 1) / elements;
  }
  return passes;
}

// The same for whole rows of V.
template <class Units, class Type, int kRows>
void aggregate_rows(const char* const* v_rows, int64_t keys, FetchAhead& fetch,
                    const typename Units::Unit* weights, int64_t width, const uint64_t* attended,
                    int64_t first_row, int64_t value_dim, const typename Units::Scalar* rescale,
                    Carry<typename Units::Scalar> carry, typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  constexpr int kVectors = value_vectors<Vectors>(kRows);
  constexpr int kMost = kVectors * Vectors::kLanes;
  for (int64_t d = 0; d < value_dim; d += kMost) {
    const int64_t count = value_dim - d < kMost ? value_dim - d : kMost;
    if (count == kMost && !attended) {
      add_values<Units, Type, kRows, kVectors, true>(v_rows, keys, fetch, d, count, weights, width,
                                                     nullptr, first_row, value_dim, rescale, carry,
                                                     output);
      continue;
    }
    with_constant<kVectors>((count + Vectors::kLanes - 1) / Vectors::kLanes, [&](auto vectors) {
      add_values<Units, Type, kRows, vectors.value, false>(v_rows, keys, fetch, d, count, weights,
                                                           width, attended, first_row, value_dim,
                                                           rescale, carry, output);
    });
  }
}

}  // namespace
}  // namespace numattn
