// AVX2 vectors of four double lanes; see avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Float64 {
  using Scalar = double;
  using Vec = __m256d;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;

  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec set(double x) { return _mm256_set1_pd(x); }
  static Vec load(const double* from) { return _mm256_loadu_pd(from); }
  static Vec load_first(const double* from, int64_t count) {
    return _mm256_maskload_pd(from, first(count));
  }
  static void store(double* to, Vec x) { _mm256_storeu_pd(to, x); }
  static void store_first(double* to, Vec x, int64_t count) {
    _mm256_maskstore_pd(to, first(count), x);
  }

  static Vec load(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Vec load_first(const float* from, int64_t count) {
    __m128 x = _mm_setzero_ps();
    __builtin_memcpy(&x, from, static_cast<size_t>(count) * sizeof(float));
    return _mm256_cvtps_pd(x);
  }
  static Vec load(const Int8* from) { return load_first(from, kLanes); }
  static Vec load_first(const Int8* from, int64_t count) {
    __m128i bytes = _mm_setzero_si128();
    __builtin_memcpy(&bytes, from, static_cast<size_t>(count));
    return _mm256_cvtepi32_pd(_mm_cvtepi8_epi32(bytes));
  }

  static Vec add(Vec a, Vec b) { return _mm256_add_pd(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_pd(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_pd(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_pd(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_pd(a, b); }
  static Vec abs(Vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }

  static double sum(Vec x) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }

  static Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm256_or_pd(magnitude, _mm256_and_pd(sign, _mm256_set1_pd(-0.0)));
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_pd(no, yes, _mm256_cmp_pd(a, b, _CMP_LT_OQ));
  }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_pd(no, yes, _mm256_cmp_pd(a, b, _CMP_EQ_OQ));
  }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i wanted =
        _mm256_and_si256(_mm256_set1_epi64x(static_cast<int>(bits & 0xf)), lane_bit);
    return _mm256_blendv_pd(other, x, _mm256_castsi256_pd(_mm256_cmpeq_epi64(wanted, lane_bit)));
  }
  static uint64_t bits_not_equal(Vec a, Vec b) {
    return static_cast<uint64_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NEQ_UQ)));
  }

  // Outside of [-1078, 1025], 2^x is 0 or infinite.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = _mm256_max_pd(_mm256_set1_pd(-1078.0), x);
    x = _mm256_min_pd(_mm256_set1_pd(1025.0), x);
    whole = _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    fraction = _mm256_sub_pd(x, whole);
  }
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    const __m128i exponent = _mm256_cvtpd_epi32(whole);
    const __m128i half = _mm_srai_epi32(exponent, 1);
    return _mm256_mul_pd(_mm256_mul_pd(x, power_of_two(half)),
                         power_of_two(_mm_sub_epi32(exponent, half)));
  }

  static void transpose(Vec (&rows)[kLanes]) {
    const Vec even_low = _mm256_unpacklo_pd(rows[0], rows[1]);
    const Vec odd_low = _mm256_unpackhi_pd(rows[0], rows[1]);
    const Vec even_high = _mm256_unpacklo_pd(rows[2], rows[3]);
    const Vec odd_high = _mm256_unpackhi_pd(rows[2], rows[3]);
    rows[0] = _mm256_permute2f128_pd(even_low, even_high, 0x20);
    rows[1] = _mm256_permute2f128_pd(odd_low, odd_high, 0x20);
    rows[2] = _mm256_permute2f128_pd(even_low, even_high, 0x31);
    rows[3] = _mm256_permute2f128_pd(odd_low, odd_high, 0x31);
  }

 private:
  static __m256i first(int64_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static Vec power_of_two(__m128i exponent) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(
        _mm256_add_epi64(_mm256_cvtepi32_epi64(exponent), _mm256_set1_epi64x(1023)), 52));
  }
};

}  // namespace
}  // namespace numattn
