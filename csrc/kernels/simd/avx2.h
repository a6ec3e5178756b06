// AVX2 with FMA and F16C: eight float lanes, for Haswell and later, Zen 1 and later. The comments
// here describe the operations of simd/arithmetic.h for every level.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Float32 {
  using Scalar = float;
  using Vec = __m256;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load_first(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first(count));
  }
  static void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
  static void store_first(float* to, Vec x, int64_t count) {
    _mm256_maskstore_ps(to, first(count), x);
  }

  static Vec load(const Float16Bits* from) { return _mm256_cvtph_ps(load_16(from)); }
  static Vec load_first(const Float16Bits* from, int64_t count) {
    return _mm256_cvtph_ps(load_first_16(from, count));
  }
  static void store(Float16Bits* to, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_float16(x));
  }
  static void store_first(Float16Bits* to, Vec x, int64_t count) {
    store_first_16(to, to_float16(x), count);
  }

  static Vec load(const Int8* from) { return load_first(from, kLanes); }
  static Vec load_first(const Int8* from, int64_t count) {
    __m128i bytes = _mm_setzero_si128();
    __builtin_memcpy(&bytes, from, static_cast<size_t>(count));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }

  static Vec load(const Bfloat16Bits* from) { return from_bfloat16(load_16(from)); }
  static Vec load_first(const Bfloat16Bits* from, int64_t count) {
    return from_bfloat16(load_first_16(from, count));
  }
  static void store(Bfloat16Bits* to, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_bfloat16(x));
  }
  static void store_first(Bfloat16Bits* to, Vec x, int64_t count) {
    store_first_16(to, to_bfloat16(x), count);
  }

  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  // a * b + c
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  // The sum of all lanes.
  static float sum(Vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  // Lane i is the sum of all lanes of x[i]. This takes half the shuffles of transposing first.
  static Vec sum_each(const Vec (&x)[kLanes]) {
    Vec pairs[4];  // each half has two summands of x[2 * i] and two of x[2 * i + 1]
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      pairs[i] = add(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                     _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    Vec halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      halves[i] = add(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                      _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
    }
    return add(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
               _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
  }

  // `magnitude`, which is not negative, with the sign of `sign`.
  static Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  // Lanes where a < b take `yes`, the others `no`.
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  // Lanes where a equals b take `yes`, the others `no`.
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  // Lanes whose bit is set keep x, the others take `other`.
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i wanted =
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane_bit);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(wanted, lane_bit)));
  }
  // A bit for every lane where a differs from b (NaN differs from everything).
  static uint64_t bits_not_equal(Vec a, Vec b) {
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)));
  }

  // x = whole + fraction, whole an integer and |fraction| <= 1/2. x is clamped to [-151, 129],
  // outside of which 2^x is 0 or infinite, so that `whole` stays an integer that
  // scale_by_power_of_two takes. The order of the operands keeps a NaN.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = _mm256_max_ps(_mm256_set1_ps(-151.0f), x);
    x = _mm256_min_ps(_mm256_set1_ps(129.0f), x);
    whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    fraction = _mm256_sub_ps(x, whole);
  }
  // x * 2^whole for a `whole` from split(). In two steps, because 2^-151 is not a float: the first
  // is exact, the second rounds once, to a subnormal number if necessary.
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    const __m256i exponent = _mm256_cvtps_epi32(whole);
    const __m256i half = _mm256_srai_epi32(exponent, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)),
                         power_of_two(_mm256_sub_epi32(exponent, half)));
  }

  // rows[i] lane j <-> rows[j] lane i
  static void transpose(Vec (&rows)[kLanes]) {
    Vec pairs[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // quads[4g + c] holds, in its 128-bit part p, column 4p + c of rows 4g .. 4g + 3
    Vec quads[kLanes];
#pragma GCC unroll 16
    for (int g = 0; g < kLanes; g += 4) {
      quads[g] = _mm256_shuffle_ps(pairs[g], pairs[g + 2], 0x44);
      quads[g + 1] = _mm256_shuffle_ps(pairs[g], pairs[g + 2], 0xee);
      quads[g + 2] = _mm256_shuffle_ps(pairs[g + 1], pairs[g + 3], 0x44);
      quads[g + 3] = _mm256_shuffle_ps(pairs[g + 1], pairs[g + 3], 0xee);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
      rows[4 + c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
    }
  }

 private:
  static __m128i load_16(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static __m128i load_first_16(const void* from, int64_t count) {
    __m128i x = _mm_setzero_si128();
    __builtin_memcpy(&x, from, static_cast<size_t>(count) * sizeof(uint16_t));
    return x;
  }
  static void store_first_16(void* to, __m128i x, int64_t count) {
    __builtin_memcpy(to, &x, static_cast<size_t>(count) * sizeof(uint16_t));
  }
  static __m128i to_float16(Vec x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec from_bfloat16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  // To nearest, ties to even; a NaN stays a NaN.
  static __m128i to_bfloat16(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec power_of_two(__m256i exponent) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace numattn
