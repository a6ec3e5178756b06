// Two adjacent bfloat16 values: an operand for products of pairs.
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

struct Bfloat16Pair {
  Bfloat16Bits elements[2];
};

inline void set_element(Bfloat16Pair& pair, int i, Bfloat16Bits x) { pair.elements[i] = x; }
// bfloat16 holds 8-bit integers exactly.
inline void set_element(Bfloat16Pair& pair, int i, Int8 x) {
  const float wide = x.value;
  uint32_t bits;
  __builtin_memcpy(&bits, &wide, sizeof(bits));
  pair.elements[i].bits = static_cast<uint16_t>(bits >> 16);
}

inline float element_of(Bfloat16Pair pair, int i) {
  const uint32_t bits = static_cast<uint32_t>(pair.elements[i].bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline Bfloat16Pair finite_pair(Bfloat16Pair pair) {
  for (int i = 0; i < 2; ++i) {
    if (element_of(pair, i) - element_of(pair, i) != 0) pair.elements[i].bits = 0;
  }
  return pair;
}

// The bits of a pair, for all lanes of a vector.
inline uint32_t bits_of(Bfloat16Pair pair) {
  uint32_t bits;
  __builtin_memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

}  // namespace
}  // namespace numattn
