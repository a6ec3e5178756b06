// What a kernel computes with, and the contract that an ISA level fulfils.
//
// `Vectors` are lanes of scalars, in which sums, softmax and options are computed. `Units` are what
// one step of a matrix product takes from each vector along the reduction: one scalar, or several
// 16-bit or 8-bit elements if an instruction multiplies and adds them at once. The two products may
// have different units: in QK^T they run along d, in the value aggregation along keys.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

template <class Type, class... Types>
concept AllAre = (std::same_as<Type, Types> && ...);

// Vectors of scalars. simd/avx2.h says what each function does.
template <class V>
concept VectorsOfScalars = requires(typename V::Vec x, typename V::Vec (&square)[V::kLanes],
                                    typename V::Scalar s, const typename V::Scalar* from,
                                    typename V::Scalar* to, int64_t count, uint64_t bits) {
  requires AllAre<const int, decltype(V::kLanes), decltype(V::kRegisters)>;
  requires AllAre<const bool, decltype(V::kFusedMultiplyAdd)>;
  requires AllAre<typename V::Vec, decltype(V::zero()), decltype(V::set(s)),
                  decltype(V::load(from)), decltype(V::load_first(from, count)),
                  decltype(V::add(x, x)), decltype(V::sub(x, x)), decltype(V::mul(x, x)),
                  decltype(V::div(x, x)), decltype(V::max(x, x)), decltype(V::abs(x)),
                  decltype(V::fma(x, x, x)), decltype(V::copy_sign(x, x)),
                  decltype(V::select_less(x, x, x, x)), decltype(V::select_equal(x, x, x, x)),
                  decltype(V::select_bits(bits, x, x)), decltype(V::scale_by_power_of_two(x, x))>;
  requires AllAre<void, decltype(V::store(to, x)), decltype(V::store_first(to, x, count)),
                  decltype(V::split(x, x, x)), decltype(V::transpose(square))>;
  requires AllAre<typename V::Scalar, decltype(V::sum(x))>;
  requires AllAre<uint64_t, decltype(V::bits_not_equal(x, x))>;
};

// Vectors that read an array's elements as scalars.
template <class V, class Stored>
concept Reads = requires(const Stored* from, int64_t count) {
  requires AllAre<typename V::Vec, decltype(V::load(from)), decltype(V::load_first(from, count))>;
};

// Vectors that also write them, rounded once.
template <class V, class Stored>
concept ReadsAndWrites =
    Reads<V, Stored> && requires(Stored* to, typename V::Vec x, int64_t count) {
      requires AllAre<void, decltype(V::store(to, x)), decltype(V::store_first(to, x, count))>;
    };

// Units of a product. A unit is as large as a scalar, and a vector of units as large as a vector of
// scalars, because logits become weights in place.
template <class U>
concept UnitsOfProduct =
    VectorsOfScalars<typename U::Vectors> &&
    sizeof(typename U::Unit) == sizeof(typename U::Vectors::Scalar) &&
    sizeof(typename U::Units) == sizeof(typename U::Vectors::Vec) &&
    requires(typename U::Unit unit, typename U::Units units, const typename U::Unit* from,
             typename U::Unit* to, typename U::Vectors::Vec x, const typename U::Vectors::Vec* xs,
             const typename U::Element* elements, int64_t count, int i) {
      requires AllAre<typename U::Units, decltype(U::set(unit)), decltype(U::load(from)),
                      decltype(U::load_first(from, count)),
                      decltype(U::load_units(elements, count)), decltype(U::join(xs)),
                      decltype(U::join_rounded(xs)), decltype(U::narrow(xs))>;
      requires AllAre<void, decltype(U::store(to, units)),
                      decltype(U::store_first(to, units, count))>;
      requires AllAre<typename U::Vectors::Vec, decltype(U::multiply_add(units, units, x)),
                      decltype(U::element(units, i))>;
      requires AllAre<typename U::Vectors::Scalar, decltype(U::element(unit, i))>;
      requires AllAre<typename U::Unit, decltype(U::finite(unit))>;
    };

// Units of one scalar.
template <class VectorsOfLevel>
struct ScalarUnits : VectorsOfLevel {
  using Vectors = VectorsOfLevel;
  using Vec = typename Vectors::Vec;
  using Scalar = typename Vectors::Scalar;
  using Unit = Scalar;
  using Units = Vec;
  using Element = Scalar;
  static constexpr int kElements = 1;  // of a unit

  // `count` elements of one row, up to a vector's worth of units; the rest is 0.
  template <class Stored>
  static Units load_units(const Stored* from, int64_t count) {
    return count >= Vectors::kLanes ? Vectors::load(from) : Vectors::load_first(from, count);
  }
  // sum + a * b, of all elements of a unit
  static Vec multiply_add(Units a, Units b, Vec sum) { return Vectors::fma(a, b, sum); }
  // The same with a's unit kLane for all lanes.
  template <int kLane>
    requires requires(Vec x) { Vectors::template fma_lane<kLane>(x, x, x); }
  static Vec multiply_add_lane(Units a, Units b, Vec sum) {
    return Vectors::template fma_lane<kLane>(a, b, sum);
  }

  // Joins kElements vectors of elements into units, without and with rounding to the unit's type.
  static Units join(const Vec* elements) { return elements[0]; }
  static Units join_rounded(const Vec* elements) { return elements[0]; }
  // Units of neighbouring lanes of kElements vectors, rounded.
  static Units narrow(const Vec* lanes) { return lanes[0]; }
  // Element `i` of each unit.
  static Vec element(Units units, int) { return units; }
  static Scalar element(Unit unit, int) { return unit; }
  // The unit with 0 in place of elements that are NaN or infinite.
  static Unit finite(Unit unit) { return unit - unit == 0 ? unit : 0; }
};

template <class VectorsOfLevel, UnitsOfProduct QkUnitsOfLevel = ScalarUnits<VectorsOfLevel>,
          UnitsOfProduct ValueUnitsOfLevel = QkUnitsOfLevel>
struct Arithmetic {
  using Vectors = VectorsOfLevel;
  using QkUnits = QkUnitsOfLevel;        // of QK^T, along d
  using ValueUnits = ValueUnitsOfLevel;  // of the value aggregation, along keys
};

// A unit's number of elements, rounded up.
template <UnitsOfProduct Units>
constexpr int64_t units_of(int64_t elements) {
  return (elements + Units::kElements - 1) / Units::kElements;
}

}  // namespace
}  // namespace numattn
