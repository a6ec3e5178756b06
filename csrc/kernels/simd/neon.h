// NEON: four float lanes, for every 64-bit Arm CPU. Functions without a comment do what they do in
// avx2.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

// Up to eight bytes, the others 0.
inline uint64_t load_bytes(const void* from, int64_t count) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  uint64_t x = 0;
  int64_t at = 0;
  const auto take = [&]<class Piece>(Piece piece) {
    if (!(count & static_cast<int64_t>(sizeof(piece)))) return;
    __builtin_memcpy(&piece, bytes + at, sizeof(piece));
    x |= static_cast<uint64_t>(piece) << (8 * at);
    at += static_cast<int64_t>(sizeof(piece));
  };
  take(uint64_t{});
  take(uint32_t{});
  take(uint16_t{});
  take(uint8_t{});
  return x;
}

struct Float32 {
  using Scalar = float;
  using Vec = float32x4_t;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;

  static Vec zero() { return vdupq_n_f32(0); }
  static Vec set(float x) { return vdupq_n_f32(x); }
  static Vec load(const float* from) { return vld1q_f32(from); }
  static Vec load_first(const float* from, int64_t count) {
    switch (count) {
      case 1:
        return vld1q_lane_f32(from, zero(), 0);
      case 2:
        return vcombine_f32(vld1_f32(from), vdup_n_f32(0));
      case 3:
        return vld1q_lane_f32(from + 2, load_first(from, 2), 2);
      default:
        return count <= 0 ? zero() : load(from);
    }
  }
  static void store(float* to, Vec x) { vst1q_f32(to, x); }
  static void store_first(float* to, Vec x, int64_t count) {
    if (count >= kLanes) return store(to, x);
    if (count & 2) vst1_f32(to, vget_low_f32(x));
    if (count == 1) vst1q_lane_f32(to, x, 0);
    if (count == 3) vst1q_lane_f32(to + 2, x, 2);
  }

  static Vec load(const Float16Bits* from) { return from_float16(load_16(from)); }
  static Vec load_first(const Float16Bits* from, int64_t count) {
    return from_float16(load_first_16(from, count));
  }
  static void store(Float16Bits* to, Vec x) { store_16(to, to_float16(x)); }
  static void store_first(Float16Bits* to, Vec x, int64_t count) {
    store_first_16(to, to_float16(x), count);
  }

  static Vec load(const Int8* from) { return load_first(from, kLanes); }
  static Vec load_first(const Int8* from, int64_t count) {
    const int16x8_t wide = vmovl_s8(vcreate_s8(load_bytes(from, count)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }

  static Vec load(const Bfloat16Bits* from) { return from_bfloat16(load_16(from)); }
  static Vec load_first(const Bfloat16Bits* from, int64_t count) {
    return from_bfloat16(load_first_16(from, count));
  }
  static void store(Bfloat16Bits* to, Vec x) { store_16(to, to_bfloat16(x)); }
  static void store_first(Bfloat16Bits* to, Vec x, int64_t count) {
    store_first_16(to, to_bfloat16(x), count);
  }

  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
  // b if either is NaN; fmax would return NaN, fmaxnm the number.
  static Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Vec abs(Vec x) { return vabsq_f32(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  // a[kLane] * b + c
  template <int kLane>
  static Vec fma_lane(Vec a, Vec b, Vec c) {
    return vfmaq_laneq_f32(c, b, a, kLane);
  }

  static float sum(Vec x) { return vaddvq_f32(x); }
  static Vec sum_each(const Vec (&x)[kLanes]) {
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
  }

  static Vec copy_sign(Vec magnitude, Vec sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return vbslq_f32(vcltq_f32(a, b), yes, no);
  }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return vbslq_f32(vceqq_f32(a, b), yes, no);
  }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    return vbslq_f32(vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), lane_bit()), x, other);
  }
  static uint64_t bits_not_equal(Vec a, Vec b) {
    return vaddvq_u32(vbicq_u32(lane_bit(), vceqq_f32(a, b)));
  }

  // As in avx2.h. fmax and fmin keep a NaN.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = vmaxq_f32(x, vdupq_n_f32(-151.0f));
    x = vminq_f32(x, vdupq_n_f32(129.0f));
    whole = vrndnq_f32(x);
    fraction = vsubq_f32(x, whole);
  }
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    const int32x4_t exponent = vcvtq_s32_f32(whole);
    const int32x4_t half = vshrq_n_s32(exponent, 1);
    return vmulq_f32(vmulq_f32(x, power_of_two(half)), power_of_two(vsubq_s32(exponent, half)));
  }

  static void transpose(Vec (&rows)[kLanes]) {
    // pairs[i] holds elements 0 and 2, or 1 and 3, of two rows in turn.
    const float64x2_t pairs[4] = {vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1])),
                                  vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1])),
                                  vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3])),
                                  vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]))};
    rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(pairs[0], pairs[2]));
    rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(pairs[1], pairs[3]));
    rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(pairs[0], pairs[2]));
    rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(pairs[1], pairs[3]));
  }

 private:
  static uint16x4_t load_16(const void* from) {
    return vld1_u16(static_cast<const uint16_t*>(from));
  }
  static uint16x4_t load_first_16(const void* from, int64_t count) {
    return vcreate_u16(load_bytes(from, 2 * count));
  }
  static void store_16(void* to, uint16x4_t x) { vst1_u16(static_cast<uint16_t*>(to), x); }
  static void store_first_16(void* to, uint16x4_t x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      vst1_lane_u16(static_cast<uint16_t*>(to) + i, x, 0);
      x = vext_u16(x, x, 1);
    }
  }
  static Vec from_float16(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
  static uint16x4_t to_float16(Vec x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
  static Vec from_bfloat16(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
  // To nearest, ties to even; a NaN stays a NaN.
  static uint16x4_t to_bfloat16(Vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
  }
  static uint32x4_t lane_bit() { return uint32x4_t{1, 2, 4, 8}; }
  static Vec power_of_two(int32x4_t exponent) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
  }
};

}  // namespace
}  // namespace numattn
