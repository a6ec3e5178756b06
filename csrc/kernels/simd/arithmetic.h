// What a kernel computes with, and the contract that an ISA level fulfils.
//
// `Vectors` are lanes of scalars, in which sums, softmax and options are computed. `Units` are what
// one step of a matrix product takes of each vector along the reduction: one scalar, or several
// 16-bit or 8-bit elements where an instruction multiplies and adds them at once. The two products
// may have different units: those of QK^T lie along d, those of the value aggregation along keys.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

// Vectors of scalars. What a function does is said where simd/avx2.h defines it.
template <class V>
concept VectorsOfScalars =
    requires(typename V::Vec x, typename V::Vec (&square)[V::kLanes], typename V::Scalar s,
             const typename V::Scalar* from, typename V::Scalar* to, int64_t count, uint64_t bits) {
      { V::kFusedMultiplyAdd } -> std::convertible_to<bool>;
      { V::kRegisters } -> std::convertible_to<int>;
      { V::zero() } -> std::same_as<typename V::Vec>;
      { V::set(s) } -> std::same_as<typename V::Vec>;
      { V::load(from) } -> std::same_as<typename V::Vec>;
      { V::load_first(from, count) } -> std::same_as<typename V::Vec>;
      { V::store(to, x) } -> std::same_as<void>;
      { V::store_first(to, x, count) } -> std::same_as<void>;
      { V::add(x, x) } -> std::same_as<typename V::Vec>;
      { V::sub(x, x) } -> std::same_as<typename V::Vec>;
      { V::mul(x, x) } -> std::same_as<typename V::Vec>;
      { V::div(x, x) } -> std::same_as<typename V::Vec>;
      { V::max(x, x) } -> std::same_as<typename V::Vec>;
      { V::abs(x) } -> std::same_as<typename V::Vec>;
      { V::fma(x, x, x) } -> std::same_as<typename V::Vec>;
      { V::sum(x) } -> std::same_as<typename V::Scalar>;
      { V::copy_sign(x, x) } -> std::same_as<typename V::Vec>;
      { V::select_less(x, x, x, x) } -> std::same_as<typename V::Vec>;
      { V::select_equal(x, x, x, x) } -> std::same_as<typename V::Vec>;
      { V::select_bits(bits, x, x) } -> std::same_as<typename V::Vec>;
      { V::bits_not_equal(x, x) } -> std::convertible_to<uint64_t>;
      { V::split(x, x, x) } -> std::same_as<void>;
      { V::scale_by_power_of_two(x, x) } -> std::same_as<typename V::Vec>;
      { V::transpose(square) } -> std::same_as<void>;
    };

// Vectors that read an array's elements as scalars.
template <class V, class Stored>
concept Reads = requires(const Stored* from, int64_t count) {
  { V::load(from) } -> std::same_as<typename V::Vec>;
  { V::load_first(from, count) } -> std::same_as<typename V::Vec>;
};

// Vectors that also write them, rounded once.
template <class V, class Stored>
concept ReadsAndWrites =
    Reads<V, Stored> && requires(Stored* to, typename V::Vec x, int64_t count) {
      { V::store(to, x) } -> std::same_as<void>;
      { V::store_first(to, x, count) } -> std::same_as<void>;
    };

// Units of the elements of a product. As large as scalars, and so are vectors of them: logits
// become weights in place.
template <class U>
concept UnitsOfProduct =
    VectorsOfScalars<typename U::Vectors> &&
    sizeof(typename U::Unit) == sizeof(typename U::Vectors::Scalar) &&
    sizeof(typename U::Units) == sizeof(typename U::Vectors::Vec) &&
    requires(typename U::Unit unit, typename U::Units units, const typename U::Unit* from,
             typename U::Unit* to, typename U::Vectors::Vec x, const typename U::Vectors::Vec* xs,
             const typename U::Element* elements, int64_t count, int i, unsigned bits) {
      { U::set(unit) } -> std::same_as<typename U::Units>;
      { U::load(from) } -> std::same_as<typename U::Units>;
      { U::load_first(from, count) } -> std::same_as<typename U::Units>;
      { U::store(to, units) } -> std::same_as<void>;
      { U::store_first(to, units, count) } -> std::same_as<void>;
      { U::load_units(elements, count) } -> std::same_as<typename U::Units>;
      { U::multiply_add(units, units, x) } -> std::same_as<typename U::Vectors::Vec>;
      { U::join(xs) } -> std::same_as<typename U::Units>;
      { U::join_rounded(xs) } -> std::same_as<typename U::Units>;
      { U::element(units, i) } -> std::same_as<typename U::Vectors::Vec>;
      { U::element(unit, i) } -> std::convertible_to<typename U::Vectors::Scalar>;
      { U::only(units, bits) } -> std::same_as<typename U::Units>;
      { U::finite(unit) } -> std::same_as<typename U::Unit>;
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

  // `count` elements of one row, up to a vector's worth of units; what is missing is 0.
  template <class Stored>
  static Units load_units(const Stored* from, int64_t count) {
    return count >= Vectors::kLanes ? Vectors::load(from) : Vectors::load_first(from, count);
  }
  // sum + a * b, of all elements of a unit
  static Vec multiply_add(Units a, Units b, Vec sum) { return Vectors::fma(a, b, sum); }

  // The units of kElements vectors of elements, without and with rounding to what a unit holds.
  static Units join(const Vec* elements) { return elements[0]; }
  static Units join_rounded(const Vec* elements) { return elements[0]; }
  // Element `i` of each unit.
  static Vec element(Units units, int) { return units; }
  static Scalar element(Unit unit, int) { return unit; }
  // Units with 0 for the elements whose bit is not set.
  static Units only(Units units, unsigned) { return units; }
  // Without the elements that are NaN or infinite: 0 in their place.
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
