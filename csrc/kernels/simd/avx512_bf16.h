// AVX-512 with BF16: the matrix products take pairs of bfloat16 and add up in float32; all else is
// as in avx512.h. For Cooper Lake and Sapphire Rapids, Zen 4 and later.
//
// The instruction takes subnormal numbers (below 1.2e-38) for 0, its operands and sums alike.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "avx512.h"

namespace numattn {
namespace {

struct Bfloat16Pairs : Float32 {
  using Single = Float32;
  struct Unit {
    Bfloat16Bits elements[2];
  };
  using Units = __m512i;
  static constexpr int kUnitElements = 2;

  using Float32::load;
  using Float32::load_first;
  using Float32::set;
  using Float32::store;
  using Float32::store_first;
  friend void set_element(Unit& unit, int i, Bfloat16Bits x) { unit.elements[i] = x; }
  // Whole numbers of 8 bits have no more digits than bfloat16.
  friend void set_element(Unit& unit, int i, Int8 x) {
    const float wide = x.value;
    uint32_t bits;
    __builtin_memcpy(&bits, &wide, sizeof(bits));
    unit.elements[i].bits = static_cast<uint16_t>(bits >> 16);
  }
  static Units set(Unit x) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  static Units load(const Unit* from) { return _mm512_loadu_si512(from); }
  static Units load_first(const Unit* from, int64_t count) {
    return _mm512_maskz_loadu_epi32(first(count), from);
  }
  static void store(Unit* to, Units x) { _mm512_storeu_si512(to, x); }
  static void store_first(Unit* to, Units x, int64_t count) {
    _mm512_mask_storeu_epi32(to, first(count), x);
  }
  // sum + a[0] * b[0] + a[1] * b[1]
  static Vec multiply_add(Units a, Units b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static Units join(const Vec* elements) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(elements[0]), 16),
                           _mm512_castps_si512(elements[1]));
  }
  static Units join_rounded(const Vec* elements) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(elements[1], elements[0]));
    return _mm512_permutexvar_epi16(interleaved(), halves);
  }
  static Vec element(Units units, int i) {
    return _mm512_castsi512_ps(
        i == 0 ? _mm512_slli_epi32(units, 16)
               : _mm512_and_si512(units, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static float element(Unit unit, int i) {
    const uint32_t bits = static_cast<uint32_t>(unit.elements[i].bits) << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static Unit finite(Unit unit) {
    for (int i = 0; i < kUnitElements; ++i) {
      if (element(unit, i) - element(unit, i) != 0) unit.elements[i].bits = 0;
    }
    return unit;
  }

 private:
  // Element i of the low half, then of the high half.
  static __m512i interleaved() {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                            6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  }
};

}  // namespace
}  // namespace numattn
