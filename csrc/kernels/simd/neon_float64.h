// NEON vectors of two double lanes; see neon.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Float64 {
  using Scalar = double;
  using Vec = float64x2_t;

  static constexpr bool kFusedMultiplyAdd = true;
  static constexpr int kLanes = 2;
  static constexpr int kRegisters = 32;

  static Vec zero() { return vdupq_n_f64(0); }
  static Vec set(double x) { return vdupq_n_f64(x); }
  static Vec load(const double* from) { return vld1q_f64(from); }
  static Vec load_first(const double* from, int64_t count) {
    if (count <= 0) return zero();
    return count == 1 ? vcombine_f64(vld1_f64(from), vdup_n_f64(0)) : load(from);
  }
  static void store(double* to, Vec x) { vst1q_f64(to, x); }
  static void store_first(double* to, Vec x, int64_t count) {
    if (count >= kLanes) return store(to, x);
    if (count == 1) vst1q_lane_f64(to, x, 0);
  }

  static Vec load(const float* from) { return vcvt_f64_f32(vld1_f32(from)); }
  static Vec load_first(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
    return count <= 0 ? zero() : vcvt_f64_f32(vld1_lane_f32(from, vdup_n_f32(0), 0));
  }
  static Vec load(const Int8* from) { return load_first(from, kLanes); }
  static Vec load_first(const Int8* from, int64_t count) {
    const int64_t first = count > 0 ? from[0].value : 0;
    const int64_t second = count > 1 ? from[1].value : 0;
    return vcvtq_f64_s64(int64x2_t{first, second});
  }

  static Vec add(Vec a, Vec b) { return vaddq_f64(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f64(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f64(a, b); }
  static Vec div(Vec a, Vec b) { return vdivq_f64(a, b); }
  static Vec max(Vec a, Vec b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static Vec abs(Vec x) { return vabsq_f64(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f64(c, a, b); }
  template <int kLane>
  static Vec fma_lane(Vec a, Vec b, Vec c) {
    return vfmaq_laneq_f64(c, b, a, kLane);
  }

  static double sum(Vec x) { return vaddvq_f64(x); }
  static Vec sum_each(const Vec (&x)[kLanes]) { return vpaddq_f64(x[0], x[1]); }

  static Vec copy_sign(Vec magnitude, Vec sign) {
    return vbslq_f64(vdupq_n_u64(uint64_t{1} << 63), sign, magnitude);
  }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return vbslq_f64(vcltq_f64(a, b), yes, no);
  }
  static Vec select_equal(Vec a, Vec b, Vec yes, Vec no) {
    return vbslq_f64(vceqq_f64(a, b), yes, no);
  }
  static Vec select_bits(uint64_t bits, Vec x, Vec other) {
    return vbslq_f64(vtstq_u64(vdupq_n_u64(bits), lane_bit()), x, other);
  }
  static uint64_t bits_not_equal(Vec a, Vec b) {
    return vaddvq_u64(vbicq_u64(lane_bit(), vceqq_f64(a, b)));
  }

  // Outside of [-1078, 1025], 2^x is 0 or infinite.
  static void split(Vec x, Vec& whole, Vec& fraction) {
    x = vmaxq_f64(x, vdupq_n_f64(-1078.0));
    x = vminq_f64(x, vdupq_n_f64(1025.0));
    whole = vrndnq_f64(x);
    fraction = vsubq_f64(x, whole);
  }
  static Vec scale_by_power_of_two(Vec x, Vec whole) {
    const int64x2_t exponent = vcvtq_s64_f64(whole);
    const int64x2_t half = vshrq_n_s64(exponent, 1);
    return vmulq_f64(vmulq_f64(x, power_of_two(half)), power_of_two(vsubq_s64(exponent, half)));
  }

  static void transpose(Vec (&rows)[kLanes]) {
    const Vec first = vtrn1q_f64(rows[0], rows[1]);
    rows[1] = vtrn2q_f64(rows[0], rows[1]);
    rows[0] = first;
  }

 private:
  static uint64x2_t lane_bit() { return uint64x2_t{1, 2}; }
  static Vec power_of_two(int64x2_t exponent) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(exponent, vdupq_n_s64(1023)), 52));
  }
};

}  // namespace
}  // namespace numattn
