// NEON with BF16: the matrix products take pairs of bfloat16 and sum in float32; everything else is
// as in neon.h. For Neoverse N2 and V1, Cortex-A710, Apple M2 and later.
//
// bfdot treats subnormal numbers (below 1.2e-38) as 0, in operands and in sums, and rounds to odd.
// bfmmla would multiply twice as much at once, but it computes blocks of 2 x 2 sums, which do not
// match the lanes of a tile.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/simd/bfloat16_pair.h"
#include "kernels/simd/neon.h"

namespace numattn {
namespace {

struct Bfloat16Pairs : Float32 {
  using Vectors = Float32;
  using Unit = Bfloat16Pair;
  using Units = uint16x8_t;
  using Element = Bfloat16Bits;
  static constexpr int kElements = 2;

  using Float32::load;
  using Float32::load_first;
  using Float32::set;
  using Float32::store;
  using Float32::store_first;
  static Units set(Unit x) { return vreinterpretq_u16_u32(vdupq_n_u32(bits_of(x))); }
  static Units load(const Unit* from) { return vld1q_u16(&from->elements[0].bits); }
  static Units load_first(const Unit* from, int64_t count) {
    return load_units(&from->elements[0], count * kElements);
  }
  static void store(Unit* to, Units x) { vst1q_u16(&to->elements[0].bits, x); }
  static void store_first(Unit* to, Units x, int64_t count) {
    Unit units[kLanes];
    store(units, x);
    for (int64_t i = 0; i < count; ++i) to[i] = units[i];
  }
  // sum + a[0] * b[0] + a[1] * b[1]
  static Vec multiply_add(Units a, Units b, Vec sum) { return vbfdotq_f32(sum, of(a), of(b)); }
  // The same with a's unit kLane for all lanes.
  template <int kLane>
  static Vec multiply_add_lane(Units a, Units b, Vec sum) {
#if defined(__clang__)
    // Clang turns the intrinsic into a broadcast and a product, and spills the broadcasts.
    __asm__("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(sum) : "w"(b), "w"(a), "i"(kLane));
    return sum;
#else
    return vbfdotq_laneq_f32(sum, of(b), of(a), kLane);
#endif
  }

  // Up to 8 elements of a row; from `count` on they are 0.
  static Units load_units(const Bfloat16Bits* from, int64_t count) {
    if (count >= 8) return vld1q_u16(&from->bits);
    const int64_t high = count > 4 ? count - 4 : 0;
    return vcombine_u16(vcreate_u16(load_bytes(from, 2 * (count - high))),
                        vcreate_u16(high > 0 ? load_bytes(from + 4, 2 * high) : 0));
  }
  static Units load_units(const Int8* from, int64_t count) {
    const int16x8_t wide = vmovl_s8(vcreate_s8(load_bytes(from, count < 8 ? count : 8)));
    const Vec low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    const Vec high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
    return vcombine_u16(high_halves(low), high_halves(high));
  }
  // Pairs of the elements of two rows, up to 8 of each; each row is 0 from its count on.
  template <class Type>
  static void load_rows(const Type* first_row, int64_t first_count, const Type* second_row,
                        int64_t second_count, Units (&units)[2]) {
    const Units a = load_units(first_row, first_count);
    const Units b = load_units(second_row, second_count);
    units[0] = vzip1q_u16(a, b);
    units[1] = vzip2q_u16(a, b);
  }

  static Units join(const Vec* elements) {
    Units units = pairs(bits(elements[0]), bits(elements[1]));
    // GCC 12 would move bfloat16 constants with an instruction for float16.
    __asm__("" : "+w"(units));
    return units;
  }
  static Units join_rounded(const Vec* elements) {
    return pairs(rounded(elements[0]), rounded(elements[1]));
  }
  // Pairs of neighbouring lanes of two vectors, rounded.
  static Units narrow(const Vec* lanes) { return vuzp2q_u16(rounded(lanes[0]), rounded(lanes[1])); }
  static Vec element(Units units, int i) {
    const uint32x4_t both = vreinterpretq_u32_u16(units);
    return vreinterpretq_f32_u32(i == 0 ? vshlq_n_u32(both, 16)
                                        : vandq_u32(both, vdupq_n_u32(0xffff0000u)));
  }
  static float element(Unit unit, int i) { return element_of(unit, i); }
  static Unit finite(Unit unit) { return finite_pair(unit); }

 private:
  static bfloat16x8_t of(Units x) { return vreinterpretq_bf16_u16(x); }
  static Units bits(Vec x) { return vreinterpretq_u16_f32(x); }
  static uint16x4_t high_halves(Vec x) { return vshrn_n_u32(vreinterpretq_u32_f32(x), 16); }
  // The high halves of each lane of two vectors as a pair.
  static Units pairs(Units first, Units second) { return vtrn2q_u16(first, second); }
  // Rounded to bfloat16, in the high half of each lane.
  static Units rounded(Vec x) {
    const bfloat16x8_t narrow = vcvtq_low_bf16_f32(x);
    return vreinterpretq_u16_u32(vshll_n_u16(vget_low_u16(vreinterpretq_u16_bf16(narrow)), 16));
  }
};

}  // namespace
}  // namespace numattn
