// The individual options, applied in place to the logits of a block; apply_options.h has their
// order.
#pragma once

#include <cstdint>

#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/lane_map.h"
#include "kernels/options/lane_masks.h"
#include "kernels/softmax/exp.h"
#include "kernels/task.h"

namespace numattn {
namespace {

// Multiplies the logits or weights [key][row] of 8-bit keys by the keys' scales.
template <class Map>
void scale_keys(const KeyRows& rows, const KeySpan& keys, typename Map::Vectors::Scalar* numbers) {
  using Vectors = typename Map::Vectors;
  for (int64_t key = 0; key < keys.count; ++key) {
    auto* const at = numbers + key * Map::kWidth;
    const typename Vectors::Scalar scale = key_scale(rows, keys.first + key);
    if constexpr (Map::kKeysPerStep == 1) {
      for (int i = 0; i < Map::kWidth; i += Vectors::kLanes) {
        Vectors::store(at + i, Vectors::mul(Vectors::load(at + i), Vectors::set(scale)));
      }
    } else {
      for (int row = 0; row < Map::kWidth; ++row) at[row] *= scale;
    }
  }
}

template <class Vectors>
void apply_scale(typename Vectors::Scalar* logits, int64_t count, double scale) {
  const auto factor = Vectors::set(static_cast<typename Vectors::Scalar>(scale));
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    Vectors::store(logits + i, Vectors::mul(Vectors::load(logits + i), factor));
  }
}

// softcap * tanh(logit / softcap)
template <class Vectors>
void apply_softcap(typename Vectors::Scalar* logits, int64_t count, double softcap) {
  const auto cap = Vectors::set(static_cast<typename Vectors::Scalar>(softcap));
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    const auto share = Vectors::div(Vectors::load(logits + i), cap);
    Vectors::store(logits + i, Vectors::mul(tanh<Vectors>(share), cap));
  }
}

// The derivative of a capped logit, from the capped logit: 1 - (capped / softcap)^2.
template <class Vectors>
void find_softcap_slopes(const typename Vectors::Scalar* capped, int64_t count, double softcap,
                         typename Vectors::Scalar* slopes) {
  const auto cap = Vectors::set(static_cast<typename Vectors::Scalar>(softcap));
  const auto one = Vectors::set(1);
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    const auto share = Vectors::div(Vectors::load(capped + i), cap);
    // (1 - share) (1 + share) keeps precision when the square is near 1.
    Vectors::store(slopes + i, Vectors::mul(Vectors::sub(one, share), Vectors::add(one, share)));
  }
}

// A bias of -inf masks, even if the logit is NaN.
template <class Vectors>
typename Vectors::Vec biased(typename Vectors::Vec logit, typename Vectors::Vec bias) {
  const auto masked = Vectors::set(-__builtin_inff());
  return Vectors::select_equal(bias, masked, masked, Vectors::add(logit, bias));
}

// bias [row][key] in memory.
template <class Map, class Element>
void add_bias(const Map& map, const View& bias, const KeySpan& keys,
              typename Map::Vectors::Scalar* logits) {
  using Vectors = typename Map::Vectors;
  constexpr int kLanes = Vectors::kLanes;
  const int64_t stride = bias.column_stride;
  const int64_t rows = map.rows.count();
  const auto key_count = [&](int64_t key) {
    return keys.count - key < kLanes ? keys.count - key : kLanes;
  };
  if constexpr (Map::kKeysPerStep == 1) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      const char* of_row[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        of_row[i] = row + i < rows ? pairs_of(bias, map.rows, row + i, keys.first) : nullptr;
      }
      for (int64_t key = 0; key < keys.count; key += kLanes) {
        typename Vectors::Vec square[kLanes];  // [row][key], then [key][row]
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          square[i] = of_row[i] ? load_elements<Vectors, Element>(of_row[i] + key * stride, stride,
                                                                  key_count(key))
                                : Vectors::zero();
        }
        Vectors::transpose(square);
        for (int64_t i = 0; i < key_count(key); ++i) {
          auto* const at = logits + (key + i) * Map::kWidth + row;
          Vectors::store(at, biased<Vectors>(Vectors::load(at), square[i]));
        }
      }
    }
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      const char* const from = pairs_of(bias, map.rows, row, keys.first);
      for (int64_t key = 0; key < keys.count; key += kLanes) {
        auto* const at = logits + key * Map::kWidth + row;
        typename Vectors::Scalar of_keys[kLanes] = {};
        for (int64_t i = 0; i < key_count(key); ++i) of_keys[i] = at[i * Map::kWidth];
        const auto added =
            load_elements<Vectors, Element>(from + key * stride, stride, key_count(key));
        Vectors::store(of_keys, biased<Vectors>(Vectors::load(of_keys), added));
        for (int64_t i = 0; i < key_count(key); ++i) at[i * Map::kWidth] = of_keys[i];
      }
    }
  }
}

// -slope * |position of the query - position of the key|
template <class Map>
void add_alibi(const Map& map, const Task& task, const KeySpan& keys,
               typename Map::Vectors::Scalar* logits) {
  using Vectors = typename Map::Vectors;
  using Scalar = typename Vectors::Scalar;
  Scalar slopes[Map::kLanes] = {};
  Scalar distances[Map::kLanes] = {};  // query position - key position at step 0
  for (int lane = 0; lane < Map::kLanes; ++lane) {
    const int64_t row = Map::row(lane);
    if (row >= map.rows.count()) continue;
    slopes[lane] = static_cast<Scalar>(task.options.alibi_slopes[map.rows.head(row)]);
    distances[lane] = static_cast<Scalar>(task.first_position + map.rows.query(row) -
                                          (keys.first + Map::key(lane)));
  }
  for (int lane = 0; lane < Map::kLanes; lane += Vectors::kLanes) {
    const auto slope = Vectors::sub(Vectors::zero(), Vectors::load(slopes + lane));
    const auto at_step_0 = Vectors::load(distances + lane);
    for (int64_t step = 0; step < Map::steps(keys.count); ++step) {
      auto* const at = logits + step * Map::kLanes + lane;
      const auto moved = Vectors::set(static_cast<Scalar>(step * Map::kKeysPerStep));
      const auto gap = Vectors::abs(Vectors::sub(at_step_0, moved));
      Vectors::store(at, Vectors::fma(gap, slope, Vectors::load(at)));
    }
  }
}

// If a row does not attend to a key, the logit becomes -inf, or `instead`, whatever it was.
template <class Map>
void apply_mask(const uint64_t* attended, int64_t keys, typename Map::Vectors::Scalar* logits,
                typename Map::Vectors::Scalar instead = -__builtin_inff()) {
  using Vectors = typename Map::Vectors;
  const auto masked = Vectors::set(instead);
  for (int64_t step = 0; step < Map::steps(keys); ++step) {
    uint64_t lanes = 0;  // a bit for each lane of the step
    for (int i = 0; i < Map::kKeysPerStep; ++i) {
      const int64_t key = step * Map::kKeysPerStep + i;
      if (Map::kKeysPerStep == 1 || key < keys) lanes |= attended[key] << i * Map::kWidth % 64;
    }
#pragma GCC unroll 8
    for (int lane = 0; lane < Map::kLanes; lane += Vectors::kLanes) {
      auto* const at = logits + step * Map::kLanes + lane;
      Vectors::store(at, Vectors::select_bits(lanes >> lane, Vectors::load(at), masked));
    }
  }
}

}  // namespace
}  // namespace numattn
