// A query tile from beginning to end: its queries as QK^T reads them, and the state of its softmax
// and its output.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/dropout.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct Tile {
  using Vectors = typename Arithmetic::Vectors;
  using QkUnits = typename Arithmetic::QkUnits;
  using Scalar = typename Vectors::Scalar;
  static constexpr int kMaxQueries = RegisterTile<Vectors>::kLanes;

  struct State : SoftmaxState<Scalar> {
    Scalar* output;  // [d][lane], not yet divided by the sum
  };

  QueryRows rows;                   // of one head, or a few queries of several
  typename QkUnits::Unit* queries;  // [unit of d][lane], negated if the scale is negative
  State chunk;                      // the keys since the last end_chunk
  State total;                      // all keys before; used from the first end_chunk on

  // Rows are padded to whole vectors of lanes.
  int vectors() const {
    return static_cast<int>((rows.count() + Vectors::kLanes - 1) / Vectors::kLanes);
  }
  int64_t lanes() const { return int64_t{vectors()} * Vectors::kLanes; }
  template <class Step>
  void with_vectors(Step step) const {
    with_constant<RegisterTile<Vectors>::kVectors>(vectors(), step);
  }

  // `rows` is set.
  void lay_out(Arena& arena, int64_t head_dim, int64_t value_dim) {
    arena.take(queries, units_of<QkUnits>(head_dim) * lanes());
    lay_out_state(arena, value_dim, chunk);
  }
  void lay_out_state(Arena& arena, int64_t value_dim, State& state) const {
    arena.take(state.output, value_dim * lanes());
    arena.take(state.maximum, lanes());
    arena.take(state.sum, lanes());
  }

  // `copy` has room for a tile's rows of queries if they may belong to several heads.
  template <int kVectors>
  void begin(const Task& task, double sink, Element* copy) const {
    const View q = rows_of_queries(task, copy);
    pack_queries<QkUnits, Element, kVectors>(q.data, q.row_stride, q.column_stride, rows.count(),
                                             task.head_dim, static_cast<Scalar>(query_sign(task)),
                                             queries);
    chunk.begin(lanes(), sink, task.weight_exponent);
    for (int64_t i = 0; i < task.value_dim * lanes(); ++i) chunk.output[i] = 0;
  }

  // Adds the chunk to the total and begins the next one; the running maximum continues.
  template <int kVectors>
  void end_chunk(const Task& task, bool is_first) const {
    constexpr int kWidth = kVectors * Vectors::kLanes;
    Scalar factor[kWidth];  // by which the total shrinks under the new maximum
    const auto scale = softmax_factor<Vectors>(softmax_scale(task));
    for (int lane = 0; lane < kWidth; lane += Vectors::kLanes) {
      Vectors::store(factor + lane, merge_chunk<Vectors>(total, chunk, lane, is_first, scale));
      Vectors::store(chunk.sum + lane, Vectors::zero());
    }
    for (int64_t i = 0; i < task.value_dim * lanes(); i += kWidth) {
      for (int lane = 0; lane < kWidth; lane += Vectors::kLanes) {
        Scalar* const to = total.output + i + lane;
        Scalar* const from = chunk.output + i + lane;
        const auto before = is_first ? Vectors::zero() : Vectors::load(to);
        Vectors::store(to, Vectors::fma(before, Vectors::load(factor + lane), Vectors::load(from)));
        Vectors::store(from, Vectors::zero());
      }
    }
  }

  // False if a result is not finite; nothing is written then. It may be finite with smaller
  // weights.
  template <int kVectors>
  bool finish(const Task& task, bool has_total) const {
    constexpr int kWidth = kVectors * Vectors::kLanes;
    const State& state = has_total ? total : chunk;
    Scalar factor[kWidth];
    const auto grow = static_cast<Scalar>(kept_scale(task.options));
    for (int i = 0; i < kWidth; ++i) factor[i] = softmax_share(state.sum[i]) * grow;
    if (task.weight_exponent != 0) {
      for (int64_t i = 0; i < task.value_dim * lanes(); i += Vectors::kLanes) {
        Scalar* const at = state.output + i;
        Vectors::store(
            at, finite_product<Vectors>(Vectors::load(at), Vectors::load(factor + i % kWidth)));
      }
      for (Scalar& x : factor) x = 1;
    } else if (!is_finite<kVectors>(task, state.output, factor)) {
      return false;
    }
    for (int64_t i = 0; task.lse.data && i < rows.queries; ++i) {
      const Scalar lse =
          log_sum_exp(state.maximum[i], state.sum[i], softmax_scale(task), task.weight_exponent);
      __builtin_memcpy(task.lse.data + (rows.first_query + i) * task.lse.row_stride, &lse,
                       sizeof(lse));
    }
    with_type_of_out<Element>(task.out_is_float32, [&]<class Type>(Stored<Type>) {
      unpack_output<Vectors, Type, kVectors>(state.output, factor, rows.queries, task.value_dim,
                                             task.out.data + rows.first_query * task.out.row_stride,
                                             task.out.row_stride, task.out.column_stride);
    });
    return true;
  }

 private:
  // The rows of q, evenly spaced: copied if they are not evenly spaced in memory.
  View rows_of_queries(const Task& task, Element* copy) const {
    View q = task.q;
    q.data += rows.first_head * q.head_stride + rows.first_query * q.row_stride;
    if (rows.heads == 1 || q.head_stride == rows.queries * q.row_stride) return q;
    if (rows.queries == 1) {
      q.row_stride = q.head_stride;
      return q;
    }
    Element* to = copy;
    for (int64_t head = 0; head < rows.heads; ++head) {
      for (int64_t query = 0; query < rows.queries; ++query) {
        const char* const from = q.data + head * q.head_stride + query * q.row_stride;
        for (int64_t d = 0; d < task.head_dim; ++d) {
          __builtin_memcpy(to++, from + d * q.column_stride, sizeof(Element));
        }
      }
    }
    constexpr auto kSize = static_cast<int64_t>(sizeof(Element));
    return {reinterpret_cast<char*>(copy), 0, task.head_dim * kSize, kSize};
  }

  template <int kVectors>
  static bool is_finite(const Task& task, const Scalar* output, const Scalar* factor) {
    if constexpr (std::same_as<Element, Float16Bits>) return true;  // float32 holds their sums
    FiniteCheck<Vectors> check;
    for (int64_t i = 0; i < task.value_dim; ++i) {
#pragma GCC unroll 4
      for (int lane = 0; lane < kVectors * Vectors::kLanes; lane += Vectors::kLanes) {
        check.add(Vectors::mul(Vectors::load(output + i * kVectors * Vectors::kLanes + lane),
                               Vectors::load(factor + lane)));
      }
    }
    return check.all_finite();
  }
};

}  // namespace
}  // namespace numattn
