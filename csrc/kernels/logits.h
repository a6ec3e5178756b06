// What the options do to the logits of a block, in their order: scale, softcap, bias, ALiBi,
// masks; in place, on logits [key][query lane].
#pragma once

#include <cstdint>

#include "exp.h"
#include "tile_io.h"

namespace numattn {
namespace {

template <class Simd, int kVectors>
void apply_scale(typename Simd::Scalar* logits, int64_t keys, typename Simd::Scalar scale) {
  const auto factor = Simd::set(scale);
  const int64_t elements = keys * kVectors * Simd::kLanes;
  for (int64_t i = 0; i < elements; i += Simd::kLanes) {
    Simd::store(logits + i, Simd::mul(Simd::load(logits + i), factor));
  }
}

// softcap * tanh(logit / softcap)
template <class Simd, int kVectors>
void apply_softcap(typename Simd::Scalar* logits, int64_t keys, typename Simd::Scalar softcap) {
  const auto cap = Simd::set(softcap);
  const int64_t elements = keys * kVectors * Simd::kLanes;
  for (int64_t i = 0; i < elements; i += Simd::kLanes) {
    const auto share = Simd::div(Simd::load(logits + i), cap);
    Simd::store(logits + i, Simd::mul(tanh<Simd>(share), cap));
  }
}

// bias [row][key] of Elements in memory, strides in bytes. A bias of -inf masks, even where the
// logit is NaN.
template <class Simd, class Element, int kVectors>
void add_bias(typename Simd::Scalar* logits, int64_t keys, const char* bias, int64_t row_stride,
              int64_t column_stride, int64_t rows) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  const auto masked = Simd::set(-__builtin_inff());
  for (int64_t row = 0; row < rows; row += Simd::kLanes) {
    for (int64_t key = 0; key < keys; key += Simd::kLanes) {
      const int64_t columns = keys - key < Simd::kLanes ? keys - key : Simd::kLanes;
      typename Simd::Vec square[Simd::kLanes];
      load_transposed<Simd, Element>(bias + row * row_stride + key * column_stride, row_stride,
                                     column_stride, rows - row, columns, square);
      for (int64_t i = 0; i < columns; ++i) {
        auto* const at = logits + (key + i) * kWidth + row;
        const auto sum = Simd::add(Simd::load(at), square[i]);
        Simd::store(at, Simd::select_equal(square[i], masked, masked, sum));
      }
    }
  }
}

// -slope * |position of the query - position of the key|. `distance` is the first query's
// position less the first key's.
template <class Simd, int kVectors>
void add_alibi(typename Simd::Scalar* logits, int64_t keys, typename Simd::Scalar slope,
               int64_t distance) {
  using Scalar = typename Simd::Scalar;
  constexpr int kWidth = kVectors * Simd::kLanes;
  const auto factor = Simd::set(-slope);
  for (int v = 0; v < kVectors; ++v) {
    Scalar first[Simd::kLanes];
    for (int i = 0; i < Simd::kLanes; ++i) {
      first[i] = static_cast<Scalar>(distance + v * Simd::kLanes + i);
    }
    const auto from_first_key = Simd::load(first);
    for (int64_t key = 0; key < keys; ++key) {
      auto* const at = logits + key * kWidth + v * Simd::kLanes;
      const auto gap = Simd::abs(Simd::sub(from_first_key, Simd::set(static_cast<Scalar>(key))));
      Simd::store(at, Simd::fma(gap, factor, Simd::load(at)));
    }
  }
}

// attended [key]: bit i is set where query lane i attends to the key; elsewhere the logit
// becomes -inf, whatever it was.
template <class Simd, int kVectors>
void apply_mask(typename Simd::Scalar* logits, int64_t keys, const uint64_t* attended) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  const auto masked = Simd::set(-__builtin_inff());
  for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      auto* const at = logits + key * kWidth + v * Simd::kLanes;
      Simd::store(at,
                  Simd::select_bits(attended[key] >> (v * Simd::kLanes), Simd::load(at), masked));
    }
  }
}

}  // namespace
}  // namespace numattn
