// What a step of the matrix products is where it takes one element at a time.
//
// A unit is what a step takes of each vector: one scalar here, a pair of 16-bit floats in
// avx512_bf16.h. Units are as large as scalars, and so are vectors of them.
#pragma once

namespace numattn {
namespace {

// Lanes has the types Scalar and Vec.
template <class Lanes>
struct ScalarUnits {
  using Scalar = typename Lanes::Scalar;
  using Vec = typename Lanes::Vec;
  using Unit = Scalar;
  using Units = Vec;
  using UnitElement = Scalar;
  static constexpr int kUnitElements = 1;

  // The unit of kUnitElements vectors of elements, without and with rounding to what it holds.
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

}  // namespace
}  // namespace numattn
