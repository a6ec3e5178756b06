// A tile of queries from its beginning to its end: the queries as the stages read them, and what
// the online softmax keeps for each of them.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/strided.h"
#include "kernels/options/logits.h"
#include "kernels/softmax/exp.h"
#include "kernels/table.h"

namespace numattn {
namespace {

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
    Scalar* output;   // [d][lane], not yet divided by the sum
    Scalar* maximum;  // [lane], of the logits that the softmax sees
    Scalar* sum;      // [lane]
  };

  int64_t first_row, rows;
  Unit* queries;  // [unit of d][lane], negated where the scale is negative
  State part;     // the keys since the last end_part
  State total;    // all keys before; used from the first end_part on

  int vectors() const { return static_cast<int>((rows + Simd::kLanes - 1) / Simd::kLanes); }
  template <class Step>
  void with_vectors(Step step) const {
    with_constant<Simd::kTileVectors>(vectors(), step);
  }

  // first_row and rows are set.
  void lay_out(Arena& arena, int64_t head_dim, int64_t value_dim) {
    arena.take(queries, units_of<Simd>(head_dim) * vectors() * Simd::kLanes);
    lay_out_state(arena, value_dim, part);
  }
  void lay_out_state(Arena& arena, int64_t value_dim, State& state) const {
    arena.take(state.output, outputs(value_dim));
    arena.take(state.maximum, int64_t{vectors()} * Simd::kLanes);
    arena.take(state.sum, int64_t{vectors()} * Simd::kLanes);
  }

  int64_t outputs(int64_t value_dim) const { return value_dim * vectors() * Simd::kLanes; }

  template <int kVectors>
  void begin(const Task& task) const {
    pack_queries<Simd, Element, kVectors>(task.q + first_row * task.q_row_stride, task.q_row_stride,
                                          task.q_column_stride, rows, task.head_dim,
                                          task.scale < 0 ? Scalar{-1} : Scalar{1}, queries);
    // A sink is a key without a value: the running sum begins with it.
    const double sink = task.sinks ? *task.sinks : -__builtin_inf();
    for (int i = 0; i < kVectors * Simd::kLanes; ++i) {
      part.maximum[i] = static_cast<Scalar>(sink);
      part.sum[i] = sink > -__builtin_inf() ? Scalar{1} : Scalar{0};
    }
    const int64_t count = outputs(task.value_dim);
    for (int64_t i = 0; i < count; ++i) part.output[i] = 0;
  }

  // Adds the part to the total and begins the next one; the maximum runs on.
  template <int kVectors>
  void end_part(const Task& task, bool is_first) const {
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
    for (int64_t i = 0; i < outputs(task.value_dim); i += kWidth) {
      for (int lane = 0; lane < kWidth; lane += Simd::kLanes) {
        Scalar* const to = total.output + i + lane;
        Scalar* const from = part.output + i + lane;
        const Vec before = is_first ? Single::zero() : Single::load(to);
        Single::store(to, Single::fma(before, Single::load(factor + lane), Single::load(from)));
        Single::store(from, Single::zero());
      }
    }
  }

  template <int kVectors>
  void finish(const Task& task, bool in_parts) const {
    const auto& [output, maximum, sum] = in_parts ? total : part;
    if (task.lse) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto lse = static_cast<Scalar>(maximum[row] * softmax_scale(task) +
                                             __builtin_log(static_cast<double>(sum[row])));
        __builtin_memcpy(task.lse + (first_row + row) * task.lse_row_stride, &lse, sizeof(lse));
      }
    }
    Scalar factor[kVectors * Simd::kLanes];
    for (int i = 0; i < kVectors * Simd::kLanes; ++i) {
      factor[i] = sum[i] == 0 ? Scalar{0} : Scalar{1} / sum[i];
    }
    unpack_output<Single, Element, kVectors>(output, factor, rows, task.value_dim,
                                             task.out + first_row * task.out_row_stride,
                                             task.out_row_stride, task.out_column_stride);
  }
};

}  // namespace
}  // namespace numattn
