// AVX-512 vectors: sixteen float lanes, for Skylake-SP and later, Zen 4 and later. Functions
// without a comment do what they do in avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Float32 {
  using Scalar = float;
  using Vec = __m512;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), from);
  }
  static void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
  static void store_first(float* to, Vec x, int64_t count) {
    _mm512_mask_storeu_ps(to, first(count), x);
  }

  static Vec load(const Float16Bits* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load_first(const Float16Bits* from, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from));
  }
  static void store(Float16Bits* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_float16(x));
  }
  static void store_first(Float16Bits* to, Vec x, int64_t count) {
    _mm256_mask_storeu_epi16(to, first(count), to_float16(x));
  }

  static Vec load(const Int8* from) {
    return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vec load_first(const Int8* from, int64_t count) {
    return from_int8(_mm_maskz_loadu_epi8(first(count), from));
  }

  static Vec load(const Bfloat16Bits* from) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load_first(const Bfloat16Bits* from, int64_t count) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(first(count), from));
  }
  static void store(Bfloat16Bits* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(x));
  }
  static void store_first(Bfloat16Bits* to, Vec x, int64_t count) {
    _mm256_mask_storeu_epi16(to, first(count), to_bfloat16(x));
  }

  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec abs(Vec x) { return _mm512_abs_ps(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static float sum(Vec x) { return _mm512_reduce_add_ps(x); }

  // Lane i is the sum of all lanes of x[i]. This takes half the shuffles of transposing first.
  static Vec sum_each(const Vec (&x)[kLanes]) {
    Vec halves[8], quarters[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      halves[i] = add(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44),
                      _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
    }
    // The four 128-bit parts of quarters[i] hold four summands each of x[i], x[i + 8], x[i + 4] and
    // x[i + 12], in this order.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      quarters[i] = add(_mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88),
                        _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xdd));
    }
    const Vec low = add(_mm512_unpacklo_ps(quarters[0], quarters[1]),
                        _mm512_unpackhi_ps(quarters[0], quarters[1]));
    const Vec high = add(_mm512_unpacklo_ps(quarters[2], quarters[3]),
                         _mm512_unpackhi_ps(quarters[2], quarters[3]));
    const Vec all = add(interleave_low(low, high), interleave_high(low, high));
    return _mm512_shuffle_f32x4(all, all, 0xd8);
  }

  static Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
  }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), other, x);
  }
  static uint64_t bits_not_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }

  // x = whole + fraction, whole an integer and |fraction| <= 1/2. An infinite x makes `fraction`
  // NaN, which scale_by_power_of_two handles. (On Zen 5, vrndscaleps runs at twice the speed of
  // vreduceps, which would save an instruction.)
  static void split(Vec x, Vec& whole, Vec& fraction) {
    constexpr int kToNearestQuiet = 0x08;
    whole = _mm512_roundscale_ps(x, kToNearestQuiet);
    fraction = _mm512_sub_ps(x, whole);
  }
  // x * 2^whole, correctly rounded. The instruction is defined to return 0 for a `whole` of -inf
  // and inf for a `whole` of inf, even if x is NaN.
  static Vec scale_by_power_of_two(Vec x, Vec whole) { return _mm512_scalef_ps(x, whole); }

  static void transpose(Vec (&rows)[kLanes]) {
    Vec pairs[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // quads[4g + c] holds, in its 128-bit part p, column 4p + c of rows 4g .. 4g + 3
    Vec quads[kLanes];
#pragma GCC unroll 16
    for (int g = 0; g < kLanes; g += 4) {
      quads[g] = interleave_low(pairs[g], pairs[g + 2]);
      quads[g + 1] = interleave_high(pairs[g], pairs[g + 2]);
      quads[g + 2] = interleave_low(pairs[g + 1], pairs[g + 3]);
      quads[g + 3] = interleave_high(pairs[g + 1], pairs[g + 3]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
      const Vec even_low = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
      const Vec odd_low = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
      const Vec even_high = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
      const Vec odd_high = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
      rows[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      rows[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      rows[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      rows[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }

 protected:
  static __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << static_cast<unsigned>(count)) - 1u);
  }

 private:
  static __m256i to_float16(Vec x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec from_int8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
  static Vec from_bfloat16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  // To nearest, ties to even; a NaN stays a NaN. (vcvtneps2bf16 treats subnormal numbers as 0.)
  static __m256i to_bfloat16(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
  }
  static Vec interleave_low(Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Vec interleave_high(Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};

}  // namespace
}  // namespace numattn
