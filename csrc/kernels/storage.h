// The 16-bit floats as they lie in memory. The vectors of simd/ load and store them as float32;
// only avx512_bf16.h multiplies them as they are.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

struct Float16Bits {
  uint16_t bits;
};
struct Bfloat16Bits {
  uint16_t bits;
};

inline bool is_minus_infinity(float x) { return x == -__builtin_inff(); }
inline bool is_minus_infinity(double x) { return x == -__builtin_inf(); }
inline bool is_minus_infinity(Float16Bits x) { return x.bits == 0xfc00; }
inline bool is_minus_infinity(Bfloat16Bits x) { return x.bits == 0xff80; }

}  // namespace
}  // namespace numattn
