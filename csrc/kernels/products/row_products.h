// The two products for few queries. K and V are read in place, elements are widened or paired in
// registers, and the lanes are elements of a row. (If K is stored transposed, the lanes are keys.)
// A row of queries is a query of one head.
#pragma once

#include <cstdint>

#include "kernels/constant.h"
#include "kernels/memory/strided.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

// Rows of queries that go through K or V together: as many as leave registers for the sums.
template <class Vectors>
constexpr int kRowsTogether = Vectors::kLanes < 4 ? Vectors::kLanes : 4;

// Calls `step` with the first row of each group of rows and their number as a constant.
template <class Vectors, class Step>
void for_row_groups(int64_t rows, Step step) {
  for (int64_t row = 0; row < rows; row += kRowsTogether<Vectors>) {
    with_constant<kRowsTogether<Vectors>>(rows - row, [&](auto together) { step(row, together); });
  }
}

// Elements of a row that one multiply_add takes.
template <class Units>
constexpr int kStep = Units::Vectors::kLanes * Units::kElements;

// Lane i of the result is the sum of all lanes of x[i].
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

// logits [key][row] = K [key][d] . queries [row][d], for kKeys rows of K, which begin `offset`
// bytes after `keys`, and kRows rows of queries; logits are `stride` apart from key to key.
template <class Units, class Type, int kRows, int kKeys>
void qk_rows(const char* const* keys, int64_t offset, const typename Units::Element* queries,
             int64_t head_dim, typename Units::Scalar* logits, int64_t stride) {
  using Vectors = typename Units::Vectors;
  // Keys that share the loads of the queries.
  constexpr int kMost = Vectors::kRegisters / 2 / kRows;
  constexpr int kFit = Vectors::kLanes / kRows < kMost ? Vectors::kLanes / kRows : kMost;
  constexpr int kTogether = kKeys == 1 || kFit < 2 ? 1 : kFit < 4 ? 2 : 4;
  constexpr int kPerSum = kKeys == 1 ? 1 : Vectors::kLanes / kRows / kTogether * kTogether;
#pragma GCC unroll 8
  for (int first = 0; first < kKeys; first += kPerSum) {
    constexpr int kCount = kPerSum < kKeys ? kPerSum : kKeys;
    typename Units::Vec sums[Vectors::kLanes];  // [key * kRows + row]
#pragma GCC unroll 16
    for (int i = 0; i < Vectors::kLanes; ++i) sums[i] = Vectors::zero();
#pragma GCC unroll 8
    for (int key = 0; key < kCount; key += kTogether) {
      const Type* from[kTogether];
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i) {
        from[i] = reinterpret_cast<const Type*>(keys[first + key + i] + offset);
      }
      const auto add = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
        typename Units::Units of_key[kTogether];
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) of_key[i] = Units::load_units(from[i] + d, count);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          const auto query = Units::load_units(queries + row * head_dim + d, count);
#pragma GCC unroll 8
          for (int i = 0; i < kTogether; ++i) {
            auto& sum = sums[(key + i) * kRows + row];
            sum = Units::multiply_add(of_key[i], query, sum);
          }
        }
      };
      int64_t d = 0;
      for (; d + kStep<Units> <= head_dim; d += kStep<Units>) add(d, kStep<Units>);
      if (d < head_dim) add(d, head_dim - d);
    }
    typename Units::Scalar lanes[Vectors::kLanes];
    Vectors::store(lanes, sum_each<Vectors>(sums));
#pragma GCC unroll 16
    for (int key = 0; key < kCount; ++key) {
      __builtin_memcpy(logits + (first + key) * stride, lanes + key * kRows,
                       kRows * sizeof(typename Units::Scalar));
    }
  }
}

// A unit of rows, of V or of transposed K, from `first` and `second` on, as kVectors vectors of
// `count` elements. A unit of one row has no second one: null.
template <class Units, class Type, int kVectors>
void load_values(const Type* first, const Type* second, int64_t count,
                 typename Units::Units (&values)[kVectors]) {
  using Vectors = typename Units::Vectors;
  // One address for all vectors: otherwise the compiler keeps an offset for each of them on the
  // stack.
  __asm__("" : "+r"(first));
  if constexpr (Units::kElements == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      values[i] = load_up_to<Vectors>(first + i * Vectors::kLanes, count - i * Vectors::kLanes);
    }
  } else {
    static_assert(Units::kElements == 2);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += 2) {
      const int64_t at = i * Vectors::kLanes;
      const int64_t left = count - at < kStep<Units> ? count - at : kStep<Units>;
      typename Units::Units pair[2];
      Units::load_rows(first + at, left, second ? second + at : first, second ? left : 0, pair);
      values[i] = pair[0];
      if (i + 1 < kVectors) values[i + 1] = pair[1];
    }
  }
}

// sums [lane][key] += query [unit of d] * K [unit of d][key] for kLanes units of d. A unit has the
// same lane as in qk_rows. `begins` means = instead of +=. K is stored transposed, with `k_stride`
// bytes from d to d. Each d is read for all keys, because short pieces would be slow to read. So
// the sums have to fit in the second-level cache.
template <class Units, class Type, int kLanes>
void add_transposed(const char* k, int64_t k_stride, int64_t keys,
                    const typename Units::Element* query, int64_t dims,
                    typename Units::Scalar* sums, int64_t sums_stride, bool begins) {
  using Vectors = typename Units::Vectors;
  constexpr int kPerUnit = Units::kElements;
  const Type* rows[kLanes * kPerUnit] = {};
  typename Units::Units of_query[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) {
    typename Units::Unit unit{};
    for (int64_t d = i * kPerUnit; d < (i + 1) * kPerUnit && d < dims; ++d) {
      rows[d] = reinterpret_cast<const Type*>(k + d * k_stride);
      __builtin_memcpy(reinterpret_cast<char*>(&unit) + d % kPerUnit * sizeof(*query), query + d,
                       sizeof(*query));
    }
    of_query[i] = Units::set(unit);
  }
  for (int64_t key = 0; key < keys; key += kStep<Units>) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; ++i) {
      const Type* const first = rows[i * kPerUnit] + key;
      const Type* second = nullptr;
      if (kPerUnit > 1 && rows[i * kPerUnit + 1]) second = rows[i * kPerUnit + 1] + key;
      typename Units::Units values[kPerUnit];
      load_values<Units, Type>(first, second, keys - key, values);
#pragma GCC unroll 2
      for (int half = 0; half < kPerUnit; ++half) {
        auto* const at = sums + i * sums_stride + key + half * Vectors::kLanes;
        const auto sum = begins ? Vectors::zero() : Vectors::load(at);
        Vectors::store(at, Units::multiply_add(values[half], of_query[i], sum));
      }
    }
  }
}

// How many scalars `sums` needs for each lane of a vector.
template <class Units>
constexpr int64_t sums_of_lane(int64_t keys) {
  return (keys + kStep<Units> - 1) / kStep<Units> * kStep<Units>;
}

// logits [key] = K [d][key] . query [d], `stride` apart, with the same bits as qk_rows.
template <class Units, class Type>
void qk_row_transposed(const char* k, int64_t k_stride, int64_t keys,
                       const typename Units::Element* query, int64_t head_dim,
                       typename Units::Scalar* sums, typename Units::Scalar* logits,
                       int64_t stride) {
  using Vectors = typename Units::Vectors;
  constexpr int kLanes = Vectors::kLanes;
  // Units of d that are read at once, for the sake of the hardware prefetcher.
  constexpr int kAtOnce = kLanes < 4 ? kLanes : 4;
  const int64_t of_lane = sums_of_lane<Units>(keys);
  const int64_t used = units_of<Units>(head_dim);
  for (int64_t i = used * of_lane; i < kLanes * of_lane; i += kLanes) {
    Vectors::store(sums + i, Vectors::zero());
  }
  int lane = 0;
  for (int64_t d = 0; d < head_dim; d += kAtOnce * Units::kElements) {
    with_constant<kAtOnce>(units_of<Units>(head_dim - d), [&](auto at_once) {
      add_transposed<Units, Type, at_once.value>(k + d * k_stride, k_stride, keys, query + d,
                                                 head_dim - d, sums + lane * of_lane, of_lane,
                                                 d < kStep<Units>);
    });
    lane = (lane + kAtOnce) % kLanes;
  }
  for (int64_t key = 0; key < keys; key += kLanes) {
    typename Vectors::Vec lanes[kLanes];  // [lane][key], then [key][lane]
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) lanes[i] = Vectors::load(sums + i * of_lane + key);
    Vectors::transpose(lanes);
    typename Units::Scalar products[kLanes];
    Vectors::store(products, sum_each<Vectors>(lanes));
    for (int64_t i = 0; i < kLanes && key + i < keys; ++i) {
      logits[(key + i) * stride] = products[i];
    }
  }
}

// A turn of `count` rows of V, which begin `offset` bytes after `keys`. The weights [unit of
// keys][row] are `stride` apart from unit to unit.
template <class Units>
struct ValuesOfTurn {
  const char* const* keys;
  int64_t offset;
  int count;
  const typename Units::Unit* weights;
  int64_t stride;
  int64_t value_dim;
};

// output [row][d] += weights [unit of keys][row] * V [key][d] for kRows rows and their `elements`
// elements from d on, in kVectors vectors. The turn is summed separately first: the rounding error
// grows with the number of turns.
template <class Units, class Type, int kRows, int kVectors>
[[gnu::always_inline]] inline void add_values(const ValuesOfTurn<Units>& turn, int64_t d,
                                              int64_t elements, typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  typename Units::Vec sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sums[row][i] = Vectors::zero();
  }
  const typename Units::Unit* weights = turn.weights;
  for (int key = 0; key < turn.count; key += Units::kElements, weights += turn.stride) {
    const auto row_of = [&](int i) {
      return key + i < turn.count
                 ? reinterpret_cast<const Type*>(turn.keys[key + i] + turn.offset) + d
                 : nullptr;
    };
    typename Units::Units values[kVectors];
    load_values<Units, Type>(row_of(0), Units::kElements > 1 ? row_of(1) : nullptr, elements,
                             values);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const auto weight = Units::set(weights[row]);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        sums[row][i] = Units::multiply_add(weight, values[i], sums[row][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      auto* const to = output + row * turn.value_dim + d + i * Vectors::kLanes;
      const int64_t left = elements - i * Vectors::kLanes;
      store_up_to<Vectors>(to, Vectors::add(load_up_to<Vectors>(to, left), sums[row][i]), left);
    }
  }
}

// The same for all elements. With fewer rows, the sums of more vectors fit in registers: one row
// takes 1.5 times as long with two vectors as with eight (Zen 3).
template <class Units, class Type, int kRows>
[[gnu::noinline]] void aggregate_rows(const ValuesOfTurn<Units> turn,
                                      typename Units::Scalar* output) {
  using Vectors = typename Units::Vectors;
  constexpr int kVectors = Vectors::kRegisters / 2 / kRows / 2 * 2;  // units may come in pairs
  constexpr int kElements = kVectors * Vectors::kLanes;
  int64_t d = 0;
  for (; d + kElements <= turn.value_dim; d += kElements) {
    add_values<Units, Type, kRows, kVectors>(turn, d, kElements, output);
  }
  if (d == turn.value_dim) return;
  const int64_t left = turn.value_dim - d;
  with_constant<kVectors>((left + Vectors::kLanes - 1) / Vectors::kLanes, [&](auto vectors) {
    add_values<Units, Type, kRows, vectors.value>(turn, d, left, output);
  });
}

}  // namespace
}  // namespace numattn
