// The second stage: the logits of a block become weights, by the online softmax of Milakov and
// Gimelshein (2018). Every lane is a query, so that its maximum and sum are plain vector
// operations down the keys.
#pragma once

#include <cstdint>

#include "kernels/softmax/exp.h"

namespace numattn {
namespace {

// highest [lane] is raised to the largest logit [key][lane] of a block.
template <class Simd, int kVectors>
void find_highest(const typename Simd::Scalar* logits, int64_t keys,
                  typename Simd::Scalar* highest) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  typename Simd::Vec so_far[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) so_far[v] = Simd::load(highest + v * Simd::kLanes);
  for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      so_far[v] = Simd::max(so_far[v], Simd::load(logits + key * kWidth + v * Simd::kLanes));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) Simd::store(highest + v * Simd::kLanes, so_far[v]);
}

// In place, logits [key][lane], where a masked one is -inf, become the weights
//   exp2(factor * (logit - maximum)) [unit of keys][lane],
// which are exactly 0 where masked; factor > 0 has the scale in it. Scaling the difference, and
// not the queries or the logits, is what keeps the error below that of the plain computation: the
// difference of near logits is exact, and so is the maximum.
// highest [lane] is the largest logit so far, this block included. maximum [lane], the same before
// this block, and sum [lane] run over all blocks of a tile; rescale [lane] is the factor by which
// what was summed under the former maximum has to shrink. The sum is that of the weights before
// they are rounded to what a unit holds.
template <class Simd, int kVectors>
void masked_softmax(typename Simd::Scalar* logits, int64_t keys, typename Simd::Scalar factor,
                    const typename Simd::Scalar* highest, typename Simd::Scalar* maximum,
                    typename Simd::Scalar* sum, typename Simd::Scalar* rescale) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  const auto masked = Simd::set(-__builtin_inff());
  const auto scale = Simd::set(factor);
  typename Simd::Vec base[kVectors];
  typename Simd::Vec block_sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * Simd::kLanes;
    // A lane that has attended to nothing yet subtracts 0: -inf - -inf would be NaN.
    const auto now = Simd::load(highest + lane);
    base[v] = Simd::select_equal(now, masked, Simd::zero(), now);
    block_sum[v] = Simd::zero();
    const auto difference = Simd::sub(Simd::load(maximum + lane), base[v]);
    Simd::store(rescale + lane, exp2<Simd>(Simd::mul(difference, scale)));
    Simd::store(maximum + lane, now);
  }
  constexpr int kPerUnit = Simd::kUnitElements;
  // What the last unit lacks attends to nothing.
  for (int64_t i = keys * kWidth; i % (kPerUnit * kWidth) != 0; i += Simd::kLanes) {
    Simd::store(logits + i, masked);
  }
  auto* const weights = reinterpret_cast<typename Simd::Unit*>(logits);
  for (int64_t key = 0; key < keys; key += kPerUnit) {
    typename Simd::Vec weight[kPerUnit][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kPerUnit; ++i) {
      const auto* const at = logits + (key + i) * kWidth;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        weight[i][v] = Simd::mul(Simd::sub(Simd::load(at + v * Simd::kLanes), base[v]), scale);
      }
      exp2<Simd>(weight[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) block_sum[v] = Simd::add(block_sum[v], weight[i][v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      typename Simd::Vec unit[kPerUnit];
#pragma GCC unroll 2
      for (int i = 0; i < kPerUnit; ++i) unit[i] = weight[i][v];
      Simd::store(weights + key / kPerUnit * kWidth + v * Simd::kLanes, Simd::join_rounded(unit));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * Simd::kLanes;
    Simd::store(sum + lane,
                Simd::fma(Simd::load(sum + lane), Simd::load(rescale + lane), block_sum[v]));
  }
}

}  // namespace
}  // namespace numattn
