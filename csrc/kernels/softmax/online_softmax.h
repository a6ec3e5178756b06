// The softmax, online: logits become weights block by block, by the method of Milakov and
// Gimelshein (2018). A running maximum and a running sum are kept for each lane; a new maximum
// shrinks what was summed under the old one.
//
// Throughout, a weight is exp2(scale * (logit - base)). `scale` > 0 includes log2(e), and the scale
// of the logits unless an option needed it earlier. Scaling the difference, not the queries or the
// logits, keeps the error below the plain computation's: the difference of near logits is exact,
// and so is the maximum. If sums of large values would overflow, all weights of a row are
// multiplied by 2^exponent (overflow.h).
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"
#include "kernels/softmax/exp.h"
#include "kernels/softmax/overflow.h"

namespace numattn {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// ---- one lane, or a vector of them -------------------------------------------------------------

// The `scale` that the functions below take.
template <class Vectors>
typename Vectors::Vec softmax_factor(double softmax_scale) {
  return Vectors::set(static_cast<typename Vectors::Scalar>(softmax_scale * kLog2E));
}

// What is subtracted from logits: the maximum, or 0 if nothing was attended to yet, because the
// difference of -inf and -inf would be NaN.
template <class Vectors>
typename Vectors::Vec softmax_base(typename Vectors::Vec maximum) {
  const auto nothing = Vectors::set(-__builtin_inff());
  return Vectors::select_equal(maximum, nothing, Vectors::zero(), maximum);
}
template <class Vectors>
typename Vectors::Vec softmax_base_of(typename Vectors::Scalar maximum) {
  return Vectors::set(is_minus_infinity(maximum) ? typename Vectors::Scalar{0} : maximum);
}

// Also the factor by which sums under the maximum `logit` shrink under the new `base`.
template <class Vectors>
typename Vectors::Vec softmax_weight(typename Vectors::Vec logit, typename Vectors::Vec base,
                                     typename Vectors::Vec scale) {
  return exp2<Vectors>(Vectors::mul(Vectors::sub(logit, base), scale));
}

// 1 / sum, the final factor of weights and outputs; 0 if nothing was attended to.
template <class Scalar>
Scalar softmax_share(Scalar sum) {
  return sum == 0 ? Scalar{0} : Scalar{1} / sum;
}

// The natural logarithm of the sum of the exponentials of the scaled logits. The product is rounded
// before it is added, whatever the compiler would choose, so that results keep their bits.
template <class Scalar>
Scalar log_sum_exp(Scalar maximum, Scalar sum, double softmax_scale, int64_t exponent) {
  const volatile double scaled = maximum * softmax_scale;
  return static_cast<Scalar>(scaled +
                             __builtin_log(static_cast<double>(sum) * power_of_two(-exponent)));
}

// ---- the state of some lanes --------------------------------------------------------------------

template <class Scalar>
struct SoftmaxState {
  Scalar* maximum;  // [lane], running, of the logits before they are scaled for the softmax
  Scalar* sum;      // [lane], of the weights under that maximum

  // A sink is a key without a value; -inf for none.
  void begin(int64_t lanes, double sink, int64_t exponent) const {
    const auto weight = static_cast<Scalar>(power_of_two(exponent));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      maximum[lane] = static_cast<Scalar>(sink);
      sum[lane] = sink > -__builtin_inf() ? weight : Scalar{0};
    }
  }
};

// Raises highest [lane] to the largest logit [key][lane] of a block.
template <class Vectors, int kVectors>
void find_highest(const typename Vectors::Scalar* logits, int64_t keys,
                  typename Vectors::Scalar* highest) {
  constexpr int kWidth = kVectors * Vectors::kLanes;
  typename Vectors::Vec so_far[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) so_far[v] = Vectors::load(highest + v * Vectors::kLanes);
  for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const auto logit = Vectors::load(logits + key * kWidth + v * Vectors::kLanes);
      so_far[v] = Vectors::max(so_far[v], logit);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) Vectors::store(highest + v * Vectors::kLanes, so_far[v]);
}

// Adds a block. Logits [key][lane], which are -inf if masked, become weights [unit of keys][lane]
// in place; masked weights are exactly 0. highest [lane] is the largest logit so far, including
// this block. rescale [lane] becomes the factor by which outputs under the former maximum have to
// shrink. The sum is taken before weights are rounded to the unit's type. With kDrops, it is also
// taken before dropping the weights whose bits in kept [key] are 0.
template <class Units, int kVectors, bool kDrops = false>
void add_block(typename Units::Scalar* logits, int64_t keys, double softmax_scale, int64_t exponent,
               const typename Units::Scalar* highest,
               const SoftmaxState<typename Units::Scalar>& state, typename Units::Scalar* rescale,
               [[maybe_unused]] const uint64_t* kept = nullptr) {
  using Vectors = typename Units::Vectors;
  constexpr int kPerUnit = Units::kElements;
  constexpr int kWidth = kVectors * Vectors::kLanes;
  const auto scale = softmax_factor<Vectors>(softmax_scale);
  const auto shift = Vectors::set(static_cast<typename Vectors::Scalar>(exponent));
  typename Vectors::Vec base[kVectors];
  typename Vectors::Vec block_sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * Vectors::kLanes;
    const auto now = Vectors::load(highest + lane);
    base[v] = softmax_base<Vectors>(now);
    block_sum[v] = Vectors::zero();
    const auto before = Vectors::load(state.maximum + lane);
    Vectors::store(rescale + lane, softmax_weight<Vectors>(before, base[v], scale));
    Vectors::store(state.maximum + lane, now);
  }
  // Pad the last unit with masked keys.
  for (int64_t i = keys * kWidth; i % (kPerUnit * kWidth) != 0; i += Vectors::kLanes) {
    Vectors::store(logits + i, Vectors::set(-__builtin_inff()));
  }
  auto* const weights = reinterpret_cast<typename Units::Unit*>(logits);
  for (int64_t key = 0; key < keys; key += kPerUnit) {
    typename Vectors::Vec weight[kPerUnit][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kPerUnit; ++i) {
      const auto* const at = logits + (key + i) * kWidth;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const auto logit = Vectors::load(at + v * Vectors::kLanes);
        weight[i][v] = Vectors::fma(Vectors::sub(logit, base[v]), scale, shift);
      }
      exp2<Vectors>(weight[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) block_sum[v] = Vectors::add(block_sum[v], weight[i][v]);
      if constexpr (kDrops) {
        const uint64_t lanes = key + i < keys ? kept[key + i] : 0;
        for (int v = 0; v < kVectors; ++v) {
          weight[i][v] =
              Vectors::select_bits(lanes >> v * Vectors::kLanes, weight[i][v], Vectors::zero());
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      typename Vectors::Vec unit[kPerUnit];
#pragma GCC unroll 2
      for (int i = 0; i < kPerUnit; ++i) unit[i] = weight[i][v];
      Units::store(weights + key / kPerUnit * kWidth + v * Vectors::kLanes,
                   Units::join_rounded(unit));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * Vectors::kLanes;
    const auto before = Vectors::load(state.sum + lane);
    const auto shrink = Vectors::load(rescale + lane);
    Vectors::store(state.sum + lane, Vectors::fma(before, shrink, block_sum[v]));
  }
}

// For one vector of lanes, adds a chunk to the total of the chunks before it, whose maximum is not
// larger. For the first chunk, the total counts as empty. Returns the factor by which the total's
// outputs shrink.
template <class Vectors>
typename Vectors::Vec merge_chunk(const SoftmaxState<typename Vectors::Scalar>& total,
                                  const SoftmaxState<typename Vectors::Scalar>& chunk, int lane,
                                  bool is_first, typename Vectors::Vec scale) {
  const auto now = Vectors::load(chunk.maximum + lane);
  const auto before = is_first ? now : Vectors::load(total.maximum + lane);
  const auto shrink = softmax_weight<Vectors>(before, softmax_base<Vectors>(now), scale);
  const auto sum = is_first ? Vectors::zero() : Vectors::load(total.sum + lane);
  Vectors::store(total.sum + lane, Vectors::fma(sum, shrink, Vectors::load(chunk.sum + lane)));
  Vectors::store(total.maximum + lane, now);
  return shrink;
}

}  // namespace
}  // namespace numattn
