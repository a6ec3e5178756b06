// The probes of a level: its fastest multiply-adds and reads, to measure the kernels against, and
// its exp2.
#pragma once

#include <cstdint>

#include "kernels/memory/strided.h"
#include "kernels/probes.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/exp.h"

namespace numattn {
namespace {

// Twelve independent chains in registers hide the latency of a multiply-add on every CPU so far.
template <class Units>
double multiply_adds(int64_t rounds) {
  using Vectors = typename Units::Vectors;
  constexpr int kChains = 12;
  constexpr int kSteps = 64;
  typename Vectors::Vec chains[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chains[i] = Vectors::set(static_cast<float>(i));
  typename Vectors::Vec elements[Units::kElements];
  for (auto& element : elements) element = Vectors::set(0.5f);
  const auto factor = Units::join(elements);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chains[i] = Units::multiply_add(factor, factor, chains[i]);
    }
  }
  // The result has to be used, or the compiler would drop the work.
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(chains[i]));
  return 2.0 * kChains * kSteps * Units::kElements * Vectors::kLanes * static_cast<double>(rounds);
}

// The sum of `count` floats, a multiple of four vectors, read as fast as memory delivers them.
template <class Vectors>
float read_floats(const float* from, int64_t count) {
  constexpr int kChains = 4;
  typename Vectors::Vec chains[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) chains[i] = Vectors::zero();
  for (int64_t at = 0; at < count; at += kChains * Vectors::kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      chains[i] = Vectors::add(chains[i], Vectors::load(from + at + i * Vectors::kLanes));
    }
  }
  return Vectors::sum(
      Vectors::add(Vectors::add(chains[0], chains[1]), Vectors::add(chains[2], chains[3])));
}

template <class Vectors, class Scalar>
void exp2_array(const Scalar* x, Scalar* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    store_up_to<Vectors>(y + i, exp2<Vectors>(load_up_to<Vectors>(x + i, count - i)), count - i);
  }
}

template <class Float32, class Float64>
constexpr Probes make_probes() {
  constexpr auto kSingle = multiply_adds<ScalarUnits<Float32>>;
  return {{kSingle, multiply_adds<ScalarUnits<Float64>>, kSingle, kSingle},
          read_floats<Float32>,
          exp2_array<Float32, float>,
          exp2_array<Float64, double>};
}

}  // namespace
}  // namespace numattn
