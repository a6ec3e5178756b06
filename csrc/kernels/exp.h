// exp2 and tanh, lane by lane.
#pragma once

namespace numattn {
namespace {

// Highest power first.
constexpr float kExp2Fused[] = {0x1.5c0df8p-10f, 0x1.3d00e2p-7f, 0x1.c6b8d0p-5f,
                                0x1.ebf97ep-3f,  0x1.62e424p-1f, 1.0f};
constexpr float kExp2Unfused[] = {1.5345812e-4f, 1.3399931e-3f, 9.6184890e-3f, 5.5503288e-2f,
                                  2.4022647e-1f, 6.9314721e-1f, 1.0f};

// x becomes 2^x, within 2 units in the last place over all of its range, subnormal results
// included; exp2(0) is 1, exp2(-inf) is 0, exp2(NaN) is NaN.
//
// 2^x = 2^whole * 2^fraction, |fraction| <= 1/2, and a polynomial for the second factor. The
// coefficients of the short one make the largest error in units in the last place smallest,
// rounding included (1.83 on AVX-512, every float tried). Without fused multiply-add its rounding
// errors alone come near 2, and it takes a longer one, whose own error is nothing beside them.
//
// Several vectors go through each step together: one after the other, their chains of dependent
// operations would fill the CPU's scheduler and wait there (1 % of a whole attention on Zen 5).
template <class Simd, int kCount>
[[gnu::always_inline]] inline void exp2(typename Simd::Vec (&x)[kCount]) {
  using Vec = typename Simd::Vec;
  constexpr int kTerms = Simd::kFusedMultiplyAdd ? 6 : 7;
  constexpr const float* kTerm = Simd::kFusedMultiplyAdd ? kExp2Fused : kExp2Unfused;
  Vec whole[kCount], fraction[kCount], power[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    Simd::split(x[i], whole[i], fraction[i]);
    power[i] = Simd::set(kTerm[0]);
  }
#pragma GCC unroll 8
  for (int term = 1; term < kTerms; ++term) {
    const Vec next = Simd::set(kTerm[term]);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) power[i] = Simd::fma(power[i], fraction[i], next);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = Simd::scale_by_power_of_two(power[i], whole[i]);
}

template <class Simd>
typename Simd::Vec exp2(typename Simd::Vec x) {
  typename Simd::Vec all[1] = {x};
  exp2<Simd>(all);
  return all[0];
}

// tanh(x) within a few units in the last place. From 5/8 on it is 1 - 2 / (e^2|x| + 1); below,
// where that would cancel, an odd polynomial.
template <class Simd>
typename Simd::Vec tanh(typename Simd::Vec x) {
  const auto one = Simd::set(1.0f);
  const auto size = Simd::abs(x);

  const auto exponential = exp2<Simd>(Simd::mul(size, Simd::set(2.8853900818f)));  // 2 / ln 2
  const auto large = Simd::sub(one, Simd::div(Simd::set(2.0f), Simd::add(exponential, one)));

  const auto square = Simd::mul(size, size);
  auto series = Simd::set(-0x1.76ac1ap-8f);
  series = Simd::fma(series, square, Simd::set(0x1.5256d8p-6f));
  series = Simd::fma(series, square, Simd::set(-0x1.b84448p-5f));
  series = Simd::fma(series, square, Simd::set(0x1.110768p-3f));
  series = Simd::fma(series, square, Simd::set(-0x1.555534p-2f));
  const auto small = Simd::fma(Simd::mul(series, square), size, size);

  return Simd::copy_sign(Simd::select_less(size, Simd::set(0.625f), small, large), x);
}

}  // namespace
}  // namespace numattn
