// The fastest multiply-adds and reads of an ISA level, to measure the kernels against.
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

// The sum of `count` floats, a multiple of four vectors, read as fast as memory gives them.
template <class Simd>
float read_floats(const float* from, int64_t count) {
  constexpr int kChains = 4;
  typename Simd::Vec chains[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) chains[i] = Simd::zero();
  for (int64_t at = 0; at < count; at += kChains * Simd::kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      chains[i] = Simd::add(chains[i], Simd::load(from + at + i * Simd::kLanes));
    }
  }
  return Simd::sum(Simd::add(Simd::add(chains[0], chains[1]), Simd::add(chains[2], chains[3])));
}

}  // namespace
}  // namespace numattn
