// The fastest multiply-adds of an ISA level, to measure the kernels against.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// Twelve independent chains in registers hide the latency of a multiply-add on every CPU so far.
template <class Simd>
double multiply_adds(int64_t rounds) {
  constexpr int kChains = 12;
  constexpr int kSteps = 64;
  typename Simd::Vec chains[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chains[i] = Simd::Single::set(static_cast<float>(i));
  typename Simd::Vec elements[Simd::kUnitElements];
  for (auto& element : elements) element = Simd::Single::set(0.5f);
  const auto factor = Simd::join(elements);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chains[i] = Simd::multiply_add(factor, factor, chains[i]);
    }
  }
  // The result has to be used, or the compiler would leave the work out.
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(chains[i]));
  return 2.0 * kChains * kSteps * Simd::kUnitElements * Simd::kLanes * static_cast<double>(rounds);
}

}  // namespace
}  // namespace numattn
