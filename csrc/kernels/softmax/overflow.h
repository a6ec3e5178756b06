// Weighted means of values near the largest number. The mean of finite values is finite, but the
// sum of their products with weights may overflow, because it is divided at the end. A kernel that
// finds a result that is not finite computes it once more, with all weights multiplied by a power
// of two so small that they add up to less than one. (Always doing so would cost the smallest
// values precision.) If an attended value is itself not finite, the second result shows it again.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// For exponents of normal numbers.
inline double power_of_two(int64_t exponent) {
  const auto bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// The largest e such that `count` weights of at most 2^e add up to 1/2 at most.
inline int64_t exponent_for(int64_t count) {
  int64_t exponent = -1;
  for (int64_t sum = 1; sum < count; sum *= 2) --exponent;
  return exponent;
}

template <class Vectors>
typename Vectors::Vec largest_number() {
  return Vectors::set(sizeof(typename Vectors::Scalar) == sizeof(double)
                          ? static_cast<typename Vectors::Scalar>(__DBL_MAX__)
                          : static_cast<typename Vectors::Scalar>(__FLT_MAX__));
}

// sum * factor. If the sum is finite, so is the result: only rounding can make the product exceed
// the largest number, and it is clamped.
template <class Vectors>
typename Vectors::Vec finite_product(typename Vectors::Vec sum, typename Vectors::Vec factor) {
  const auto most = largest_number<Vectors>();
  const auto product = Vectors::mul(sum, factor);
  const auto least = Vectors::sub(Vectors::zero(), most);
  auto clamped = Vectors::select_less(most, product, most, product);
  clamped = Vectors::select_less(clamped, least, least, clamped);
  return Vectors::select_equal(Vectors::sub(sum, sum), Vectors::zero(), clamped, product);
}

// Checks whether any of the numbers passed to add() is NaN or infinite.
template <class Vectors>
struct FiniteCheck {
  typename Vectors::Vec nan_unless_finite = Vectors::zero();

  void add(typename Vectors::Vec x) {
    nan_unless_finite = Vectors::fma(x, Vectors::zero(), nan_unless_finite);
  }
  bool all_finite() const {
    return Vectors::bits_not_equal(nan_unless_finite, Vectors::zero()) == 0;
  }
};

}  // namespace
}  // namespace numattn
