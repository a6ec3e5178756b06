// Any CPU: four float lanes or two double lanes in the compiler's own vectors (GCC and Clang),
// which become SSE2 on baseline x86-64 and NEON on arm64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

typedef float FloatLanes __attribute__((vector_size(16)));
typedef double DoubleLanes __attribute__((vector_size(16)));
typedef int32_t FloatLaneBits __attribute__((vector_size(16)));
typedef int64_t DoubleLaneBits __attribute__((vector_size(16)));

// The parts of a floating-point type. Adding `kRounder` leaves no bits for a fraction.
template <class Scalar>
struct Format;
template <>
struct Format<float> {
  using Scalar = float;
  using Vec = FloatLanes;
  using Bits = FloatLaneBits;
  using Int = int32_t;
  static constexpr int kFractionBits = 23, kBias = 127;
  static constexpr float kRounder = 0x1.8p23f, kLowest = -151, kHighest = 129;
};
template <>
struct Format<double> {
  using Scalar = double;
  using Vec = DoubleLanes;
  using Bits = DoubleLaneBits;
  using Int = int64_t;
  static constexpr int kFractionBits = 52, kBias = 1023;
  static constexpr double kRounder = 0x1.8p52, kLowest = -1078, kHighest = 1025;
};

template <class ScalarType>
struct Generic {
  using Scalar = ScalarType;
  using Vec = typename Format<Scalar>::Vec;

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr bool kFusedMultiplyAdd = true;
#else
  static constexpr bool kFusedMultiplyAdd = false;
#endif
  static constexpr int kLanes = 16 / sizeof(Scalar);
  static constexpr int kRegisters = 16;  // at least

  static Vec zero() { return Vec{}; }
  static Vec set(Scalar x) { return x - Vec{}; }
  static Vec load(const Scalar* from) {
    Vec x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static Vec load_first(const Scalar* from, int64_t count) {
    Vec x{};
    __builtin_memcpy(&x, from, static_cast<size_t>(count) * sizeof(Scalar));
    return x;
  }
  static void store(Scalar* to, Vec x) { __builtin_memcpy(to, &x, sizeof(x)); }
  static void store_first(Scalar* to, Vec x, int64_t count) {
    __builtin_memcpy(to, &x, static_cast<size_t>(count) * sizeof(Scalar));
  }

  // Elements of other types, lane by lane. They may be unaligned.
  template <class Stored>
  static Vec load(const Stored* from) {
    return load_first(from, kLanes);
  }
  template <class Stored>
  static Vec load_first(const Stored* from, int64_t count) {
    Vec x{};
    for (int64_t i = 0; i < count; ++i) {
      Stored element;
      __builtin_memcpy(&element, from + i, sizeof(element));
      x[i] = widened(element);
    }
    return x;
  }
  template <class Stored>
  static void store(Stored* to, Vec x) {
    store_first(to, x, kLanes);
  }
  template <class Stored>
  static void store_first(Stored* to, Vec x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Stored element;
      narrow(x[i], element);
      __builtin_memcpy(to + i, &element, sizeof(element));
    }
  }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec abs(Vec x) { return (Vec)((Bits)x & magnitude()); }
  // a * b + c, which the build's -ffp-contract=fast fuses where the CPU can
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

  static Scalar sum(Vec x) {
    if constexpr (kLanes == 2) return x[0] + x[1];
    return (x[0] + x[kLanes - 2]) + (x[1] + x[kLanes - 1]);
  }

  static Vec copy_sign(Vec size, Vec sign) {
    return (Vec)((Bits)size | ((Bits)sign & ~magnitude()));
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) { return a == b ? yes : no; }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    Bits lane_bit;
    for (int i = 0; i < kLanes; ++i) lane_bit[i] = Int{1} << i;
    const Bits wanted = (static_cast<Int>(bits & 0xf) - Bits{}) & lane_bit;
    return wanted == lane_bit ? x : other;
  }
  static uint64_t bits_not_equal(Vec a, Vec b) {
    const Bits differ = a != b;
    uint64_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(differ[i] & 1) << i;
    return bits;
  }

  // x = whole + fraction, whole an integer and |fraction| <= 1/2. x is clamped to the range outside
  // of which 2^x is 0 or infinite, so that `whole` stays an integer that scale_by_power_of_two
  // takes. Comparisons with a NaN are false, so it stays.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = x < set(This::kLowest) ? set(This::kLowest) : x;
    x = x > set(This::kHighest) ? set(This::kHighest) : x;
    const Vec rounder = set(This::kRounder);
    whole = (x + rounder) - rounder;
    fraction = x - whole;
  }
  // x * 2^whole for a `whole` from split(). In two steps, because the smallest power is not
  // representable: the first is exact, the second rounds once, to a subnormal number if necessary.
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    // Adding the rounder leaves the integer in the lowest bits.
    const Bits exponent = (Bits)(whole + set(This::kRounder)) - (Bits)set(This::kRounder);
    const Bits half = exponent >> 1;
    return x * power_of_two(half) * power_of_two(exponent - half);
  }

  static void transpose(Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = i + 1; j < kLanes; ++j) {
        const Scalar above = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = above;
      }
    }
  }

 private:
  using This = Format<Scalar>;
  using Bits = typename This::Bits;
  using Int = typename This::Int;

  static Bits magnitude() { return ~(Bits)set(-Scalar{0}); }
  static Vec power_of_two(Bits exponent) {
    return (Vec)((exponent + This::kBias) << This::kFractionBits);
  }

  static float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(x));
    return bits;
  }

  static Scalar widened(float x) { return x; }
  static Scalar widened(Int8 x) { return x.value; }
  static float widened(Bfloat16Bits x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
  static void narrow(float x, Bfloat16Bits& to) {
    const uint32_t bits = bits_of(x);
    const uint32_t to_even = 0x7fff + (bits >> 16 & 1);
    to.bits = static_cast<uint16_t>((x == x ? bits + to_even : bits | 0x400000) >> 16);
  }

  // The range of float32 is wider by a factor of 2^112 at either end.
  static float widened(Float16Bits x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t size = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    if (size >= 0x0f800000) return float_of(sign | 0x7f800000 | size);  // inf and NaN
    return float_of(sign | bits_of(float_of(size) * 0x1p112f));
  }
  static void narrow(float x, Float16Bits& to) {
    const uint32_t bits = bits_of(x);
    const uint32_t size = bits & 0x7fffffff;
    uint32_t half;
    if (x != x) {
      half = 0x7e00 | (size >> 13 & 0x3ff);
    } else if (size >= bits_of(65520.0f)) {
      half = 0x7c00;
    } else if (size < bits_of(0x1p-14f)) {
      // Adding 1/2 rounds to multiples of 2^-24, the smallest float16.
      half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    } else {
      half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    }
    to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
  }
};

using Float32 = Generic<float>;
using Float64 = Generic<double>;

}  // namespace
}  // namespace numattn
