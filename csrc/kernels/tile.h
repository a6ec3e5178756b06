// A tile of queries from its beginning to its end: the queries as the stages read them, and what
// the online softmax keeps for each of them.
#pragma once

#include <cstdint>

#include "exp.h"
#include "few_queries.h"
#include "key_block.h"
#include "table.h"
#include "tile_io.h"

namespace numattn {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kSmallestScale = 1e-30;

// The logits are scaled before the softmax where an option wants them so, or where the scale is so
// small that its product with a logit of -inf would not be -inf. Else the softmax scales.
inline bool scales_logits(const PrefillTask& task) {
  return task.softcap > 0 || task.bias || task.alibi_slope != 0 || task.sink > -__builtin_inf() ||
         __builtin_fabs(task.scale) < kSmallestScale;
}
inline double softmax_scale(const PrefillTask& task) {
  return scales_logits(task) ? 1.0 : __builtin_fabs(task.scale);
}

// Hands out consecutive pieces of the scratch, or counts them where there is none.
struct Arena {
  char* base;
  int64_t used;

  template <class Item>
  void take(Item*& piece, int64_t items) {
    piece = base ? reinterpret_cast<Item*>(base + used) : nullptr;
    used += (items * static_cast<int64_t>(sizeof(Item)) + 63) / 64 * 64;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `step` with a number from 1 to kMost as a compile-time constant.
template <int kMost, class Step>
void with_constant(int64_t number, Step step) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_constant<kMost - 1>(number, step);
  }
  step(Constant<kMost>{});
}

template <class Simd>
constexpr int64_t units_of(int64_t elements) {
  return (elements + Simd::kUnitElements - 1) / Simd::kUnitElements;
}

// Rows are padded to whole vectors: `width` lanes.
template <class Simd, class Element>
struct Tile {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  using Unit = typename Simd::Unit;
  using Single = typename Simd::Single;
  static constexpr int kMaxRows = Simd::kTileVectors * Simd::kLanes;

  // What the softmax keeps of some keys.
  struct State {
    Scalar* output;   // [d][lane], not yet divided by the sum; [row][d] if few()
    Scalar* maximum;  // [lane], of the logits that the softmax sees
    Scalar* sum;      // [lane]
  };

  int64_t first_row, rows;
  Unit* queries;        // [unit of d][lane], negated where the scale is negative
  Scalar* few_queries;  // [row][d], likewise; null unless few()
  State part;           // the keys since the last end_part
  State total;          // all keys before; used from the first end_part on

  int vectors() const { return static_cast<int>((rows + Simd::kLanes - 1) / Simd::kLanes); }
  // So few queries that the lanes are elements.
  bool few() const { return rows <= kFewQueries<Simd>; }

  template <class Step>
  void with_rows(Step step) const {
    with_constant<kFewQueries<Simd>>(rows, step);
  }
  template <class Step>
  void with_vectors(Step step) const {
    with_constant<Simd::kTileVectors>(vectors(), step);
  }

  // first_row and rows are set.
  void lay_out(Arena& arena, int64_t head_dim, int64_t value_dim) {
    const int64_t width = int64_t{vectors()} * Simd::kLanes;
    if (few()) {
      arena.take(few_queries, rows * head_dim);
    } else {
      arena.take(queries, units_of<Simd>(head_dim) * width);
    }
    lay_out_state(arena, value_dim, part);
  }
  void lay_out_state(Arena& arena, int64_t value_dim, State& state) const {
    arena.take(state.output, outputs(value_dim));
    arena.take(state.maximum, int64_t{vectors()} * Simd::kLanes);
    arena.take(state.sum, int64_t{vectors()} * Simd::kLanes);
  }

  int64_t outputs(int64_t value_dim) const {
    return value_dim * (few() ? rows : int64_t{vectors()} * Simd::kLanes);
  }

  template <int kVectors>
  void begin(const PrefillTask& task) const {
    const char* const q = task.q + first_row * task.q_row_stride;
    if (few()) {
      widen_rows<Single, Element>({q, task.q_row_stride, task.q_column_stride, task.head_dim}, rows,
                                  few_queries);
      for (int64_t i = 0; task.scale < 0 && i < rows * task.head_dim; ++i) {
        few_queries[i] = -few_queries[i];
      }
    } else {
      pack_queries<Simd, Element, kVectors>(q, task.q_row_stride, task.q_column_stride, rows,
                                            task.head_dim, task.scale < 0 ? Scalar{-1} : Scalar{1},
                                            queries);
    }
    // A sink is a key without a value: the running sum begins with it.
    const bool has_sink = task.sink > -__builtin_inf();
    for (int i = 0; i < kVectors * Simd::kLanes; ++i) {
      part.maximum[i] = static_cast<Scalar>(task.sink);
      part.sum[i] = has_sink ? Scalar{1} : Scalar{0};
    }
    const int64_t count = outputs(task.value_dim);
    for (int64_t i = 0; i < count; ++i) part.output[i] = 0;
  }

  // Adds the part to the total and begins the next one; the maximum runs on.
  template <int kVectors>
  void end_part(const PrefillTask& task, bool is_first) const {
    constexpr int kWidth = kVectors * Simd::kLanes;
    Scalar factor[kWidth];  // by which the total shrinks under the new maximum
    const auto scale = Single::set(static_cast<Scalar>(softmax_scale(task) * kLog2E));
    const auto nothing = Single::set(-__builtin_inff());
    for (int i = 0; i < kWidth; i += Simd::kLanes) {
      const Vec now = Single::load(part.maximum + i);
      const Vec base = Single::select_equal(now, nothing, Single::zero(), now);
      const Vec before = is_first ? now : Single::load(total.maximum + i);
      const Vec shrink = exp2<Single>(Single::mul(Single::sub(before, base), scale));
      const Vec sum = is_first ? Single::zero() : Single::load(total.sum + i);
      Single::store(total.sum + i, Single::fma(sum, shrink, Single::load(part.sum + i)));
      Single::store(part.sum + i, Single::zero());
      Single::store(total.maximum + i, now);
      Single::store(factor + i, shrink);
    }
    // A vector of outputs has one lane per query, or is of one query.
    const int64_t count = outputs(task.value_dim);
    const int64_t row_outputs = few() ? task.value_dim : kWidth;
    for (int64_t begin = 0, row = 0; begin < count; begin += row_outputs, ++row) {
      for (int64_t i = 0; i < row_outputs; i += Simd::kLanes) {
        const int64_t left = row_outputs - i;
        const Vec shrink = few() ? Single::set(factor[row]) : Single::load(factor + i);
        Scalar* const to = total.output + begin + i;
        const Vec before = is_first ? Single::zero() : load_up_to<Single>(to, left);
        const Vec more = load_up_to<Single>(part.output + begin + i, left);
        store_up_to<Single>(to, Single::fma(before, shrink, more), left);
        store_up_to<Single>(part.output + begin + i, Single::zero(), left);
      }
    }
  }

  template <int kVectors>
  void finish(const PrefillTask& task, bool in_parts) const {
    const auto& [output, maximum, sum] = in_parts ? total : part;
    if (task.lse) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto lse = static_cast<Scalar>(maximum[row] * softmax_scale(task) +
                                             __builtin_log(static_cast<double>(sum[row])));
        __builtin_memcpy(task.lse + (first_row + row) * task.lse_stride, &lse, sizeof(lse));
      }
    }
    Scalar factor[kVectors * Simd::kLanes];
    for (int i = 0; i < kVectors * Simd::kLanes; ++i) {
      factor[i] = sum[i] == 0 ? Scalar{0} : Scalar{1} / sum[i];
    }
    char* const out = task.out + first_row * task.out_row_stride;
    if (few()) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto row_factor = Single::set(factor[row]);
        for (int64_t d = 0; d < task.value_dim; d += Simd::kLanes) {
          const int64_t left = task.value_dim - d;
          const int64_t count = left < Simd::kLanes ? left : Simd::kLanes;
          const Vec x = load_up_to<Single>(output + row * task.value_dim + d, count);
          store_elements<Single, Element>(
              out + row * task.out_row_stride + d * task.out_column_stride, task.out_column_stride,
              Single::mul(x, row_factor), count);
        }
      }
      return;
    }
    unpack_output<Single, Element, kVectors>(output, factor, rows, task.value_dim, out,
                                             task.out_row_stride, task.out_column_stride);
  }
};

}  // namespace
}  // namespace numattn
