// Turns run-time numbers and loop indices into compile-time constants: one template instance for
// each.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `step` with `number`, from 1 to kMost, or with kMost if it is larger.
template <int kMost, class Step>
void with_constant(int64_t number, Step step) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_constant<kMost - 1>(number, step);
  }
  step(Constant<kMost>{});
}

// Calls `step` with each number from kFirst to kEnd - 1.
template <int kFirst, int kEnd, class Step>
[[gnu::always_inline]] inline void for_constants(const Step& step) {
  if constexpr (kFirst < kEnd) {
    step(Constant<kFirst>{});
    for_constants<kFirst + 1, kEnd>(step);
  }
}

// Calls `step` with `number`, a power of two up to kMost.
template <int kMost, class Step>
void with_power_of_two(int64_t number, Step step) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_power_of_two<kMost / 2>(number, step);
  }
  step(Constant<kMost>{});
}

}  // namespace
}  // namespace numattn
