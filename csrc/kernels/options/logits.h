// What the options do to the logits of a block, in their order: scale, softcap, bias, ALiBi,
// masks; in place, on logits [key][query lane].
#pragma once

#include <cstdint>

#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/softmax/exp.h"
#include "kernels/table.h"

namespace numattn {
namespace {

constexpr double kSmallestScale = 1e-30;

inline bool has_alibi(const Task& task) {
  for (int64_t head = 0; task.alibi_slopes && head < task.heads; ++head) {
    if (task.alibi_slopes[head] != 0) return true;
  }
  return false;
}
inline bool has_sink(const Task& task) {
  for (int64_t head = 0; task.sinks && head < task.heads; ++head) {
    if (task.sinks[head] > -__builtin_inf()) return true;
  }
  return false;
}

// The logits are scaled before the softmax where an option wants them so, or where the scale is so
// small that its product with a logit of -inf would not be -inf. Else the softmax scales.
inline bool scales_logits(const Task& task) {
  return task.softcap > 0 || task.bias || has_alibi(task) || has_sink(task) ||
         __builtin_fabs(task.scale) < kSmallestScale;
}
inline double softmax_scale(const Task& task) {
  return scales_logits(task) ? 1.0 : __builtin_fabs(task.scale);
}

// Calls `use` with a null pointer of the type of the bias's elements.
template <class Element, class Use>
void with_bias_type(const Task& task, Use use) {
  if (task.bias_is_float32) {
    use(static_cast<float*>(nullptr));
  } else {
    use(static_cast<Element*>(nullptr));
  }
}

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

// bias [key] of Elements for one row, whose logits are `width` apart; as above.
template <class Simd, class Element>
void add_bias_of_row(typename Simd::Scalar* logits, int64_t width, int64_t keys, const char* bias,
                     int64_t column_stride) {
  const auto masked = Simd::set(-__builtin_inff());
  for (int64_t key = 0; key < keys; key += Simd::kLanes) {
    const int64_t count = keys - key < Simd::kLanes ? keys - key : Simd::kLanes;
    typename Simd::Scalar lanes[Simd::kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = logits[(key + i) * width];
    const auto added =
        load_elements<Simd, Element>(bias + key * column_stride, column_stride, count);
    Simd::store(lanes,
                Simd::select_equal(added, masked, masked, Simd::add(Simd::load(lanes), added)));
    for (int64_t i = 0; i < count; ++i) logits[(key + i) * width] = lanes[i];
  }
}

// -slope * |position of the query - position of the key|: for each lane its slope, and its
// position less that of its first key; `step` keys on is the next one.
template <class Simd, int kVectors>
void add_alibi(typename Simd::Scalar* logits, int64_t steps, int64_t step,
               const typename Simd::Scalar* slopes, const typename Simd::Scalar* distances) {
  using Scalar = typename Simd::Scalar;
  constexpr int kWidth = kVectors * Simd::kLanes;
  for (int v = 0; v < kVectors; ++v) {
    const auto slope = Simd::sub(Simd::zero(), Simd::load(slopes + v * Simd::kLanes));
    const auto from_first_key = Simd::load(distances + v * Simd::kLanes);
    for (int64_t i = 0; i < steps; ++i) {
      auto* const at = logits + i * kWidth + v * Simd::kLanes;
      const auto moved = Simd::set(static_cast<Scalar>(i * step));
      const auto gap = Simd::abs(Simd::sub(from_first_key, moved));
      Simd::store(at, Simd::fma(gap, slope, Simd::load(at)));
    }
  }
}

// What belongs to a key of 8 bits, its logits or its weights, times the key's scale.
template <class Simd, int kVectors>
void scale_keys(typename Simd::Scalar* numbers, int64_t keys, const KeyRows& rows, int64_t first) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  for (int64_t key = 0; key < keys; ++key) {
    const auto factor = Simd::set(key_scale(rows, first + key));
    for (int i = 0; i < kWidth; i += Simd::kLanes) {
      auto* const at = numbers + key * kWidth + i;
      Simd::store(at, Simd::mul(Simd::load(at), factor));
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
