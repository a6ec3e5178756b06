// What decoding keeps of a chunk of keys, and how the chunks become a result.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/strided.h"
#include "kernels/options/logits.h"
#include "kernels/softmax/exp.h"
#include "kernels/table.h"

namespace numattn {
namespace {

// Of one head of K and V.
inline int64_t rows_of(const Task& task) { return task.heads * task.queries; }

inline KeyRows rows_of_head(KeyRows rows, int64_t kv_head) {
  rows.data += kv_head * rows.head_stride;
  if (rows.scales) rows.scales += kv_head * rows.scale_head_stride;
  return rows;
}

// What the task is for one of its heads of K and V alone. A mask or a bias has no part in it.
inline Task task_of_head(const Task& task, int64_t kv_head) {
  Task alone = task;
  const int64_t head = kv_head * task.heads;
  alone.kv_heads = 1;
  alone.q += head * task.q_head_stride;
  alone.out += head * task.out_head_stride;
  if (task.lse) alone.lse += head * task.lse_head_stride;
  if (task.alibi_slopes) alone.alibi_slopes += head;
  if (task.sinks) alone.sinks += head;
  alone.k = rows_of_head(task.k, kv_head);
  alone.v = rows_of_head(task.v, kv_head);
  alone.state = static_cast<char*>(task.state) + kv_head * task.state_head_stride;
  return alone;
}

// Rows take a power of two of places. Where those are fewer than lanes, a vector of logits is that
// of several keys.
constexpr int64_t width_of_rows(int64_t rows) {
  int64_t width = 1;
  while (width < rows) width *= 2;
  return width;
}
template <class Simd>
int64_t lanes_of_rows(int64_t rows) {
  const int64_t width = width_of_rows(rows);
  return width < Simd::kLanes ? Simd::kLanes : width;
}

// Lane i of a maximum or sum belongs to row i % width.
template <class Simd, class Element>
struct DecodeState {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;

  Scalar* output;   // [row][d], not yet divided by the sum
  Scalar* maximum;  // [lane], of the logits that the softmax sees
  Scalar* sum;      // [lane], of some of the keys

  static DecodeState lay_out(Arena& arena, int64_t rows, int64_t value_dim) {
    DecodeState state;
    arena.take(state.output, rows * value_dim);
    arena.take(state.maximum, lanes_of_rows<Simd>(rows));
    arena.take(state.sum, lanes_of_rows<Simd>(rows));
    return state;
  }
  static DecodeState at(void* memory, int64_t rows, int64_t value_dim) {
    Arena arena{static_cast<char*>(memory), 0};
    return lay_out(arena, rows, value_dim);
  }
  static int64_t bytes(int64_t rows, int64_t value_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, rows, value_dim);
    return arena.used;
  }

  void clear(int64_t rows, int64_t value_dim) const {
    for (int64_t i = 0; i < rows * value_dim; ++i) output[i] = 0;
    for (int64_t i = 0; i < lanes_of_rows<Simd>(rows); ++i) {
      maximum[i] = static_cast<Scalar>(-__builtin_inf());
      sum[i] = 0;
    }
  }

  // Merges the states of a task's chunks, which stand `bytes` apart, and writes out and lse. The
  // first state is overwritten.
  static void finish(const Task& task, int64_t chunks, int64_t bytes) {
    for (int64_t head = 0; head < task.kv_heads; ++head) {
      finish_head(task_of_head(task, head), chunks, bytes);
    }
  }

 private:
  static void finish_head(const Task& task, int64_t count, int64_t bytes) {
    const int64_t rows = rows_of(task);
    const auto state_of = [&](int64_t chunk) {
      return at(static_cast<char*>(task.state) + chunk * bytes, rows, task.value_dim);
    };
    const DecodeState merged = state_of(0);
    const auto scale = static_cast<Scalar>(softmax_scale(task) * kLog2E);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = row / task.queries;
      const int64_t query = row % task.queries;
      // A sink is a key without a value.
      const auto sink = static_cast<Scalar>(task.sinks ? task.sinks[head] : -__builtin_inf());
      Scalar maximum = sink;
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        const Scalar here = state_of(chunk).maximum[row];
        if (here > maximum || here != here) maximum = here;
      }
      const Scalar base = is_minus_infinity(maximum) ? Scalar{0} : maximum;
      const auto power = [&](Scalar here) { return exp2<Simd>(Simd::set((here - base) * scale)); };

      Scalar* const total = merged.output + row * task.value_dim;
      Scalar sum = is_minus_infinity(sink) ? Scalar{0} : first_lane(power(sink));
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        const DecodeState state = state_of(chunk);
        const Vec factor = power(state.maximum[row]);
        Scalar of_chunk = 0;
        for (int64_t lane = row; lane < lanes_of_rows<Simd>(rows); lane += width_of_rows(rows)) {
          of_chunk += state.sum[lane];
        }
        sum += of_chunk * first_lane(factor);
        const Scalar* const from = state.output + row * task.value_dim;
        for (int64_t d = 0; d < task.value_dim; d += Simd::kLanes) {
          const int64_t left = task.value_dim - d;
          const Vec before = chunk == 0 ? Simd::zero() : load_up_to<Simd>(total + d, left);
          store_up_to<Simd>(total + d, Simd::fma(load_up_to<Simd>(from + d, left), factor, before),
                            left);
        }
      }

      const Vec factor = Simd::set(sum == 0 ? Scalar{0} : Scalar{1} / sum);
      char* const out = task.out + head * task.out_head_stride + query * task.out_row_stride;
      for (int64_t d = 0; d < task.value_dim; d += Simd::kLanes) {
        const int64_t left = task.value_dim - d;
        store_elements<Simd, Element>(out + d * task.out_column_stride, task.out_column_stride,
                                      Simd::mul(load_up_to<Simd>(total + d, left), factor),
                                      left < Simd::kLanes ? left : Simd::kLanes);
      }
      if (task.lse) {
        const auto lse = static_cast<Scalar>(maximum * softmax_scale(task) +
                                             __builtin_log(static_cast<double>(sum)));
        __builtin_memcpy(task.lse + head * task.lse_head_stride + query * task.lse_row_stride, &lse,
                         sizeof(lse));
      }
    }
  }

  static Scalar first_lane(Vec x) {
    Scalar lanes[Simd::kLanes];
    Simd::store(lanes, x);
    return lanes[0];
  }
};

}  // namespace
}  // namespace numattn
