// Array elements that are not scalars of the vectors. Vectors load and store 16-bit floats as
// float32 and load 8-bit integers as floats; avx512_bf16.h and neon_bf16.h also multiply bfloat16
// directly.
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

template <class Type>
struct Stored {
  using type = Type;
};

// Calls `use` with Stored<Other> or Stored<Element>. Only this function knows which types other
// than q's K, V and a bias may have.
template <class Other, class Element, class Use>
decltype(auto) with_stored_type(bool is_other, Use use) {
  return is_other ? use(Stored<Other>{}) : use(Stored<Element>{});
}

// The same for `out`, which may be float32 if the inputs are 16-bit.
template <class Element, class Use>
decltype(auto) with_type_of_out(bool is_float32, Use use) {
  if constexpr (sizeof(Element) == 2) return with_stored_type<float, Element>(is_float32, use);
  return use(Stored<Element>{});
}

}  // namespace
}  // namespace numattn
