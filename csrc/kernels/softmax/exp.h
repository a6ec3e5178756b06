// exp2, exp and tanh, lane by lane, in float32 and float64.
#pragma once

namespace numattn {
namespace {

// Coefficients, the highest power first.
template <class Scalar, bool kFused>
struct Exp2Series;
template <>
struct Exp2Series<float, true> {
  static constexpr float kTerms[] = {0x1.5c0df8p-10f, 0x1.3d00e2p-7f, 0x1.c6b8d0p-5f,
                                     0x1.ebf97ep-3f,  0x1.62e424p-1f, 1.0f};
};
template <>
struct Exp2Series<float, false> {
  static constexpr float kTerms[] = {1.5345812e-4f, 1.3399931e-3f, 9.6184890e-3f, 5.5503288e-2f,
                                     2.4022647e-1f, 6.9314721e-1f, 1.0f};
};
template <bool kFused>
struct Exp2Series<double, kFused> {
  static constexpr double kTerms[] = {
      0x1.e9d3fe3952179p-32, 0x1.e6063f7217bc6p-28, 0x1.b524fae627834p-24, 0x1.62bfd47773353p-20,
      0x1.ffcbfc670dcd4p-17, 0x1.430913096fd9fp-13, 0x1.5d87fe78a5276p-10, 0x1.3b2ab6fba1ddap-7,
      0x1.c6b08d704a0c2p-5,  0x1.ebfbdff82c598p-3,  0x1.62e42fefa39efp-1,  1.0};
};

// tanh(x) = x + x^3 * series(x^2)
template <class Scalar>
struct TanhSeries;
template <>
struct TanhSeries<float> {
  static constexpr float kTerms[] = {-0x1.76ac1ap-8f, 0x1.5256d8p-6f, -0x1.b84448p-5f,
                                     0x1.110768p-3f, -0x1.555534p-2f};
};
template <>
struct TanhSeries<double> {
  static constexpr double kTerms[] = {
      -0x1.21522c06d082ap-16, 0x1.4ddd5fb800f82p-14, -0x1.e3f90249802dbp-13, 0x1.33fc7f7473d21p-11,
      -0x1.7d80275a99754p-10, 0x1.d6d17faac7499p-9,  -0x1.226e29216080bp-7,  0x1.664f4836ffb5ep-6,
      -0x1.ba1ba1b92a52cp-5,  0x1.11111111107acp-3,  -0x1.5555555555553p-2};
};

// result[i] is the series in x[i]. Several vectors go through each step together: processed one by
// one, their chains of dependent operations would fill the CPU's scheduler and wait there (1 % of a
// whole attention on Zen 5).
template <class Vectors, int kTerms, int kCount>
[[gnu::always_inline]] inline void sum_series(const typename Vectors::Scalar (&terms)[kTerms],
                                              const typename Vectors::Vec (&x)[kCount],
                                              typename Vectors::Vec (&result)[kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result[i] = Vectors::set(terms[0]);
#pragma GCC unroll 16
  for (int term = 1; term < kTerms; ++term) {
    const auto next = Vectors::set(terms[term]);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) result[i] = Vectors::fma(result[i], x[i], next);
  }
}

// x becomes 2^x, within 2 units in the last place over all of its range, subnormal results
// included; exp2(0) is 1, exp2(-inf) is 0, exp2(NaN) is NaN.
//
// 2^x = 2^whole * 2^fraction, |fraction| <= 1/2, and a polynomial for the second factor. The
// coefficients of the short polynomial minimize the largest error in units in the last place,
// rounding included (1.83 on AVX-512, every float tried). Without fused multiply-add, its rounding
// errors would come near 2 on their own. A longer polynomial, whose own error is negligible, is
// used then, and always in float64.
template <class Vectors, int kCount, bool kShort = Vectors::kFusedMultiplyAdd>
[[gnu::always_inline]] inline void exp2(typename Vectors::Vec (&x)[kCount]) {
  using Series = Exp2Series<typename Vectors::Scalar, kShort>;
  typename Vectors::Vec whole[kCount], fraction[kCount], power[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) Vectors::split(x[i], whole[i], fraction[i]);
  sum_series<Vectors>(Series::kTerms, fraction, power);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = Vectors::scale_by_power_of_two(power[i], whole[i]);
}

template <class Vectors>
typename Vectors::Vec exp2(typename Vectors::Vec x) {
  typename Vectors::Vec all[1] = {x};
  exp2<Vectors>(all);
  return all[0];
}

// For exp: ln 2 in two parts, the first with so few digits that its product with every exponent is
// exact; and the limits beyond which e^x is 0 or infinite.
template <class Scalar>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 0x1.715476p+0f, kHighLn2 = 0x1.62e4p-1f,
                         kLowLn2 = 0x1.7f7d1cp-20f, kLowest = -105, kHighest = 89;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep+0, kHighLn2 = 0x1.62e42feep-1,
                          kLowLn2 = 0x1.a39ef35793c76p-33, kLowest = -747, kHighest = 710;
};

// e^x within 3 units in the last place over all of its range; exp(0) is 1, exp(-inf) is 0, exp(NaN)
// is NaN. Like exp2, it is 2^whole * 2^fraction, but the fraction comes from the rest of x after
// `whole`: rounding x * log2(e) would leave fewer digits for the fraction.
template <class Vectors>
[[gnu::always_inline]] inline typename Vectors::Vec exp(typename Vectors::Vec x) {
  using Scalar = typename Vectors::Scalar;
  using Constants = ExpConstants<Scalar>;
  using Series = Exp2Series<Scalar, Vectors::kFusedMultiplyAdd>;
  const auto log2e = Vectors::set(Constants::kLog2E);
  const auto highest = Vectors::set(Constants::kHighest);
  x = Vectors::max(Vectors::set(Constants::kLowest), x);
  x = Vectors::select_less(highest, x, highest, x);
  typename Vectors::Vec whole, unused, fraction[1], power[1];
  Vectors::split(Vectors::mul(x, log2e), whole, unused);
  const auto rest = Vectors::fma(whole, Vectors::set(-Constants::kHighLn2), x);
  fraction[0] = Vectors::mul(Vectors::fma(whole, Vectors::set(-Constants::kLowLn2), rest), log2e);
  sum_series<Vectors>(Series::kTerms, fraction, power);
  return Vectors::scale_by_power_of_two(power[0], whole);
}

// tanh(x) within a few units in the last place. From 5/8 on it is 1 - 2 / (e^2|x| + 1). Below, this
// would cancel, and an odd polynomial is used instead.
template <class Vectors>
typename Vectors::Vec tanh(typename Vectors::Vec x) {
  using Scalar = typename Vectors::Scalar;
  constexpr Scalar kTwoLog2E = static_cast<Scalar>(2.8853900817779268);
  const auto one = Vectors::set(1);
  const auto size = Vectors::abs(x);

  const auto exponential = exp2<Vectors>(Vectors::mul(size, Vectors::set(kTwoLog2E)));
  const auto large =
      Vectors::sub(one, Vectors::div(Vectors::set(2), Vectors::add(exponential, one)));

  const typename Vectors::Vec square[1] = {Vectors::mul(size, size)};
  typename Vectors::Vec series[1];
  sum_series<Vectors>(TanhSeries<Scalar>::kTerms, square, series);
  const auto small = Vectors::fma(Vectors::mul(series[0], square[0]), size, size);

  return Vectors::copy_sign(
      Vectors::select_less(size, Vectors::set(static_cast<Scalar>(0.625)), small, large), x);
}

}  // namespace
}  // namespace numattn
