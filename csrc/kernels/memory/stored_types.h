// Elements as they lie in memory that are no scalars of the vectors: the vectors of simd/ load and
// store 16-bit floats as float32, and load 8-bit integers as floats; only avx512_bf16.h multiplies
// 16-bit floats as they are.
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
struct Int8 {
  int8_t value;
};

inline bool is_minus_infinity(float x) { return x == -__builtin_inff(); }
inline bool is_minus_infinity(double x) { return x == -__builtin_inf(); }
inline bool is_minus_infinity(Float16Bits x) { return x.bits == 0xfc00; }
inline bool is_minus_infinity(Bfloat16Bits x) { return x.bits == 0xff80; }

}  // namespace
}  // namespace numattn
