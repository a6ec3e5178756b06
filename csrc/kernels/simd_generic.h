// Any CPU: four float lanes in the compiler's own vectors (GCC and Clang), which become SSE2 on
// baseline x86-64 and NEON on arm64.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

struct Float32 {
  using Scalar = float;
  typedef float Vec __attribute__((vector_size(16)));

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr bool kFusedMultiplyAdd = true;
#else
  static constexpr bool kFusedMultiplyAdd = false;
#endif
  static constexpr int kLanes = 4;
  // Two query vectors by four keys leave room among 16 registers for the products that a CPU
  // without fused multiply-add needs.
  static constexpr int kTileVectors = 2;
  static constexpr int broadcast_rows(int) { return 4; }

  static Vec zero() { return Vec{}; }
  static Vec set(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* from) {
    Vec x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static Vec load_first(const float* from, int64_t count) {
    Vec x{};
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
    return x;
  }
  static void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof(x)); }
  static void store_first(float* to, Vec x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
  }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec abs(Vec x) { return (Vec)((Bits)x & kMagnitude); }
  // a * b + c, which the build's -ffp-contract=fast fuses where the CPU can
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

  // All lanes added up.
  static float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

  // `magnitude`, which is not negative, with the sign of `sign`.
  static Vec copy_sign(Vec magnitude, Vec sign) {
    return (Vec)((Bits)magnitude | ((Bits)sign & ~kMagnitude));
  }
  // Lanes where a < b take `yes`, the others `no`.
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
  // Lanes where a equals b take `yes`, the others `no`.
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) { return a == b ? yes : no; }
  // Lanes whose bit is set keep x, the others take `other`.
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    const Bits lane_bit = {1, 2, 4, 8};
    const int32_t word = static_cast<int32_t>(bits & 0xf);
    const Bits wanted = Bits{word, word, word, word} & lane_bit;
    return wanted == lane_bit ? x : other;
  }
  // A bit for every lane where a differs from b (NaN differs from everything).
  static uint64_t bits_not_equal(Vec a, Vec b) {
    const Bits differ = a != b;
    return static_cast<uint64_t>((differ[0] & 1) | (differ[1] & 2) | (differ[2] & 4) |
                                 (differ[3] & 8));
  }

  // x = whole + fraction, whole an integer and |fraction| <= 1/2. What lies outside of
  // [-151, 129], where 2^x is 0 or infinite, is moved to its ends, so that `whole` stays an
  // integer that scale_by_power_of_two takes. Comparisons are false for a NaN, which stays.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = x < set(-151.0f) ? set(-151.0f) : x;
    x = x > set(129.0f) ? set(129.0f) : x;
    // Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to an integer.
    const Vec rounder = set(12582912.0f);
    whole = (x + rounder) - rounder;
    fraction = x - whole;
  }
  // x * 2^whole for a `whole` from split(). In two steps, because 2^-151 is no float: the first
  // is exact, the second rounds once, into the subnormal numbers if need be.
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    const Bits exponent = __builtin_convertvector(whole, Bits);
    const Bits half = exponent >> 1;
    return x * power_of_two(half) * power_of_two(exponent - half);
  }

  // rows[i] lane j <-> rows[j] lane i
  static void transpose(Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = i + 1; j < kLanes; ++j) {
        const float above = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = above;
      }
    }
  }

 private:
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr Bits kMagnitude = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};

  static Vec power_of_two(Bits exponent) { return (Vec)((exponent + 127) << 23); }
};

}  // namespace
}  // namespace numattn
