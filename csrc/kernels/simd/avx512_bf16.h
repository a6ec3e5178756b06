// AVX-512 with BF16: the matrix products take pairs of bfloat16 and sum in float32; everything else
// is as in avx512.h. For Cooper Lake and Sapphire Rapids, Zen 4 and later.
//
// The instruction treats subnormal numbers (below 1.2e-38) as 0, in operands and in sums.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/simd/avx512.h"
#include "kernels/simd/bfloat16_pair.h"

namespace numattn {
namespace {

struct Bfloat16Pairs : Float32 {
  using Vectors = Float32;
  using Unit = Bfloat16Pair;
  using Units = __m512i;
  using Element = Bfloat16Bits;
  static constexpr int kElements = 2;

  using Float32::load;
  using Float32::load_first;
  using Float32::set;
  using Float32::store;
  using Float32::store_first;
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

  // Up to 32 elements of a row; from `count` on they are 0.
  static Units load_units(const Bfloat16Bits* from, int64_t count) {
    return count >= 32 ? _mm512_loadu_si512(from)
                       : _mm512_maskz_loadu_epi16(first_elements(count), from);
  }
  static Units load_units(const Int8* from, int64_t count) {
    const Vec low = load_up_to_lanes(from, count);
    const Vec high = count > kLanes ? load_up_to_lanes(from + kLanes, count - kLanes) : zero();
    return reinterpret_cast<Units>(_mm512_cvtne2ps_pbh(high, low));
  }
  // Pairs of the elements of two rows, up to 32 of each; each row is 0 from its count on.
  static void load_rows(const Bfloat16Bits* first_row, int64_t first_count,
                        const Bfloat16Bits* second_row, int64_t second_count, Units (&units)[2]) {
    const Units a = load_units(first_row, first_count);
    const Units b = load_units(second_row, second_count);
    units[0] = _mm512_permutex2var_epi16(a, alternating(0, 32), b);
    units[1] = _mm512_permutex2var_epi16(a, alternating(16, 48), b);
  }
  static void load_rows(const Int8* first_row, int64_t first_count, const Int8* second_row,
                        int64_t second_count, Units (&units)[2]) {
    for (int i = 0; i < 2; ++i) {
      const int64_t at = i * kLanes;
      const Vec elements[2] = {
          first_count > at ? load_up_to_lanes(first_row + at, first_count - at) : zero(),
          second_count > at ? load_up_to_lanes(second_row + at, second_count - at) : zero()};
      units[i] = join(elements);
    }
  }

  static Units join(const Vec* elements) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(elements[0]), 16),
                           _mm512_castps_si512(elements[1]));
  }
  static Units join_rounded(const Vec* elements) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(elements[1], elements[0]));
    return _mm512_permutexvar_epi16(alternating(0, 16), halves);
  }
  // Pairs of neighbouring lanes of two vectors, rounded.
  static Units narrow(const Vec* lanes) {
    return reinterpret_cast<Units>(_mm512_cvtne2ps_pbh(lanes[1], lanes[0]));
  }
  static Vec element(Units units, int i) {
    return _mm512_castsi512_ps(
        i == 0 ? _mm512_slli_epi32(units, 16)
               : _mm512_and_si512(units, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static float element(Unit unit, int i) { return element_of(unit, i); }
  static Unit finite(Unit unit) { return finite_pair(unit); }

 private:
  // `first`, `second`, `first` + 1, `second` + 1 and so on.
  static Units alternating(int first, int second) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi16(_mm512_or_si512(steps, _mm512_slli_epi32(steps, 16)),
                            _mm512_set1_epi32(second << 16 | first));
  }
  static __mmask32 first_elements(int64_t count) {
    return static_cast<__mmask32>((uint64_t{1} << static_cast<unsigned>(count)) - 1u);
  }
  static Vec load_up_to_lanes(const Int8* from, int64_t count) {
    return count >= kLanes ? load(from) : load_first(from, count);
  }
};

}  // namespace
}  // namespace numattn
