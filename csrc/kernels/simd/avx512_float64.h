// AVX-512 vectors of eight double lanes; see avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Float64 {
  using Scalar = double;
  using Vec = __m512d;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 32;

  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec set(double x) { return _mm512_set1_pd(x); }
  static Vec load(const double* from) { return _mm512_loadu_pd(from); }
  static Vec load_first(const double* from, int64_t count) {
    return _mm512_maskz_loadu_pd(first(count), from);
  }
  static void store(double* to, Vec x) { _mm512_storeu_pd(to, x); }
  static void store_first(double* to, Vec x, int64_t count) {
    _mm512_mask_storeu_pd(to, first(count), x);
  }

  static Vec load(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
  static Vec load_first(const float* from, int64_t count) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(count), from));
  }
  static Vec load(const Int8* from) { return load_first(from, kLanes); }
  static Vec load_first(const Int8* from, int64_t count) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first(count), from);
    return _mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(bytes));
  }

  static Vec add(Vec a, Vec b) { return _mm512_add_pd(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_pd(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_pd(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_pd(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_pd(a, b); }
  static Vec abs(Vec x) { return _mm512_abs_pd(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }

  static double sum(Vec x) { return _mm512_reduce_add_pd(x); }

  static Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm512_or_pd(magnitude, _mm512_and_pd(sign, _mm512_set1_pd(-0.0)));
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), no, yes);
  }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    return _mm512_mask_blend_pd(static_cast<__mmask8>(bits), other, x);
  }
  static uint64_t bits_not_equal(Vec a, Vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }

  static void split(Vec x, Vec& whole, Vec& fraction) {
    constexpr int kToNearestQuiet = 0x08;
    whole = _mm512_roundscale_pd(x, kToNearestQuiet);
    fraction = _mm512_sub_pd(x, whole);
  }
  static Vec scale_by_power_of_two(Vec x, Vec whole) { return _mm512_scalef_pd(x, whole); }

  static void transpose(Vec (&rows)[kLanes]) {
    // pairs[2g + c] holds, in its 128-bit part p, column 2p + c of rows 2g and 2g + 1
    Vec pairs[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm512_unpacklo_pd(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_pd(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const Vec even_low = _mm512_shuffle_f64x2(pairs[c], pairs[2 + c], 0x88);
      const Vec odd_low = _mm512_shuffle_f64x2(pairs[c], pairs[2 + c], 0xdd);
      const Vec even_high = _mm512_shuffle_f64x2(pairs[4 + c], pairs[6 + c], 0x88);
      const Vec odd_high = _mm512_shuffle_f64x2(pairs[4 + c], pairs[6 + c], 0xdd);
      rows[c] = _mm512_shuffle_f64x2(even_low, even_high, 0x88);
      rows[2 + c] = _mm512_shuffle_f64x2(odd_low, odd_high, 0x88);
      rows[4 + c] = _mm512_shuffle_f64x2(even_low, even_high, 0xdd);
      rows[6 + c] = _mm512_shuffle_f64x2(odd_low, odd_high, 0xdd);
    }
  }

 private:
  static __mmask8 first(int64_t count) {
    return static_cast<__mmask8>((1u << static_cast<unsigned>(count)) - 1u);
  }
};

}  // namespace
}  // namespace numattn
