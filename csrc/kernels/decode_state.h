// What decoding keeps of a chunk of keys, and how the chunks become a result.
#pragma once

#include <cstdint>

#include "kernels/memory/arena.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_map.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

// All queries of the query heads that share a KV head.
inline QueryRows rows_of(const Task& task) { return {0, task.queries, task.heads}; }

// The same task for one of its KV heads. (The KV heads of a task share mask and bias.)
inline Task task_of_head(const Task& task, int64_t kv_head) {
  Task alone = task;
  const int64_t head = kv_head * task.heads;
  const auto move = [](View& view, int64_t heads) {
    if (view.data) view.data += heads * view.head_stride;
  };
  alone.kv_heads = 1;
  move(alone.q, head);
  move(alone.out, head);
  move(alone.lse, head);
  move(alone.k.rows, kv_head);
  move(alone.k.scales, kv_head);
  move(alone.v.rows, kv_head);
  move(alone.v.scales, kv_head);
  alone.options = options_from_head(task.options, head);
  alone.state = static_cast<char*>(task.state) + kv_head * task.state_head_stride;
  return alone;
}

// Places for the rows of a key (LaneMap): a power of two.
constexpr int64_t width_of_rows(int64_t rows) {
  int64_t width = 1;
  while (width < rows) width *= 2;
  return width;
}
template <class Vectors>
int64_t lanes_of_rows(int64_t rows) {
  const int64_t width = width_of_rows(rows);
  return width < Vectors::kLanes ? Vectors::kLanes : width;
}

// Lane i of a maximum or sum belongs to row i % width; the sums of a row's lanes are added up.
template <class Vectors, class Element>
struct DecodeState : SoftmaxState<typename Vectors::Scalar> {
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;

  Scalar* output;     // [row][d], not yet divided by the sum
  Scalar* largest;    // [row], at least the largest magnitude in its output; infinite if not finite
  int64_t* exponent;  // [row], of the weights (softmax/overflow.h)

  static DecodeState lay_out(Arena& arena, int64_t rows, int64_t value_dim) {
    DecodeState state;
    arena.take(state.output, rows * value_dim);
    arena.take(state.largest, rows);
    arena.take(state.exponent, rows);
    arena.take(state.maximum, lanes_of_rows<Vectors>(rows));
    arena.take(state.sum, lanes_of_rows<Vectors>(rows));
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

  // Sinks are added when the chunks are merged.
  void clear(int64_t rows, int64_t value_dim, int64_t weight_exponent) const {
    clear_output(rows, value_dim);
    for (int64_t row = 0; row < rows; ++row) {
      largest[row] = 0;
      exponent[row] = weight_exponent;
    }
    this->begin(lanes_of_rows<Vectors>(rows), -__builtin_inf(), 0);
  }

  void clear_output(int64_t rows, int64_t value_dim) const {
    for (int64_t i = 0; i < rows * value_dim; ++i) output[i] = 0;
  }

  // Call this after all keys of the chunk are added for these rows, which share the result in
  // `largest`. Returns whether all of their outputs are finite.
  bool find_largest(int64_t first_row, int64_t rows, int64_t value_dim) const {
    FiniteCheck<Vectors> check;
    Vec most = Vectors::zero();
    const Scalar* const from = output + first_row * value_dim;
    for (int64_t i = 0; i < rows * value_dim; i += Vectors::kLanes) {
      const Vec x = load_up_to<Vectors>(from + i, rows * value_dim - i);
      check.add(x);
      most = Vectors::max(Vectors::abs(x), most);
    }
    Scalar lanes[Vectors::kLanes];
    Vectors::store(lanes, most);
    Scalar found = 0;
    for (const Scalar x : lanes) found = x > found ? x : found;
    if (!check.all_finite()) found = static_cast<Scalar>(__builtin_inf());
    for (int64_t row = first_row; row < first_row + rows; ++row) largest[row] = found;
    return check.all_finite();
  }

  // Merges the states of a task's chunks, which are `bytes` apart, and writes out and lse. The
  // first state is overwritten.
  static void finish(const Task& task, int64_t chunks, int64_t bytes) {
    for (int64_t head = 0; head < task.kv_heads; ++head) {
      const Task alone = task_of_head(task, head);
      for (int64_t row = 0; row < rows_of(alone).count(); ++row) {
        finish_row(alone, row, chunks, bytes);
      }
    }
  }

 private:
  static void finish_row(const Task& task, int64_t row, int64_t chunks, int64_t bytes) {
    const int64_t rows = rows_of(task).count();
    const auto state_of = [&](int64_t chunk) {
      return at(static_cast<char*>(task.state) + chunk * bytes, rows, task.value_dim);
    };
    const auto sink = static_cast<Scalar>(sink_of(task, rows_of(task).head(row)));
    Scalar maximum = sink;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Scalar here = state_of(chunk).maximum[row];
      if (here > maximum || here != here) maximum = here;
    }
    const int64_t exponent = exponent_of_total(row, chunks, state_of);
    const Vec base = softmax_base_of<Vectors>(maximum);
    const Vec scale = softmax_factor<Vectors>(softmax_scale(task));
    const auto weight = [&](Scalar of, int64_t power) {
      const Vec difference = Vectors::sub(Vectors::set(of), base);
      return exp2<Vectors>(
          Vectors::fma(difference, scale, Vectors::set(static_cast<Scalar>(power))));
    };

    Scalar* const total = state_of(0).output + row * task.value_dim;
    Scalar sum = is_minus_infinity(sink) ? Scalar{0} : first_lane(weight(sink, exponent));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const DecodeState state = state_of(chunk);
      const Vec factor = weight(state.maximum[row], exponent - state.exponent[row]);
      Scalar of_chunk = 0;
      for (int64_t lane = row; lane < lanes_of_rows<Vectors>(rows); lane += width_of_rows(rows)) {
        of_chunk += state.sum[lane];
      }
      sum = first_lane(Vectors::fma(Vectors::set(of_chunk), factor, Vectors::set(sum)));
      const Scalar* const from = state.output + row * task.value_dim;
      for (int64_t d = 0; d < task.value_dim; d += Vectors::kLanes) {
        const int64_t left = task.value_dim - d;
        const Vec before = chunk == 0 ? Vectors::zero() : load_up_to<Vectors>(total + d, left);
        const Vec added = load_up_to<Vectors>(from + d, left);
        store_up_to<Vectors>(total + d, Vectors::fma(added, factor, before), left);
      }
    }
    write_row(task, row, total, maximum, sum, exponent);
  }

  // 0, unless a row's outputs in the chunks, or their sum, are too large for the weights they were
  // computed with.
  template <class StateOf>
  static int64_t exponent_of_total(int64_t row, int64_t chunks, StateOf state_of) {
    constexpr auto kLargest =
        static_cast<Scalar>(sizeof(Scalar) == sizeof(double) ? __DBL_MAX__ : __FLT_MAX__);
    Scalar largest = 0;
    int64_t exponent = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const DecodeState state = state_of(chunk);
      if (state.largest[row] > largest) largest = state.largest[row];
      if (state.exponent[row] < exponent) exponent = state.exponent[row];
    }
    if (exponent == 0 && largest < kLargest / static_cast<Scalar>(2 * chunks)) return 0;
    return exponent + exponent_for(chunks);
  }

  static void write_row(const Task& task, int64_t row, const Scalar* total, Scalar maximum,
                        Scalar sum, int64_t exponent) {
    const int64_t head = rows_of(task).head(row);
    const int64_t query = rows_of(task).query(row);
    const Vec factor = Vectors::set(softmax_share(sum));
    const int64_t stride = task.out.column_stride;
    char* const out = task.out.data + head * task.out.head_stride + query * task.out.row_stride;
    for (int64_t d = 0; d < task.value_dim; d += Vectors::kLanes) {
      const int64_t left = task.value_dim - d;
      const Vec sums = load_up_to<Vectors>(total + d, left);
      const Vec shares =
          exponent == 0 ? Vectors::mul(sums, factor) : finite_product<Vectors>(sums, factor);
      with_type_of_out<Element>(task.out_is_float32, [&]<class Type>(Stored<Type>) {
        store_elements<Vectors, Type>(out + d * stride, stride, shares,
                                      left < Vectors::kLanes ? left : Vectors::kLanes);
      });
    }
    if (!task.lse.data) return;
    const Scalar lse = log_sum_exp(maximum, sum, softmax_scale(task), exponent);
    __builtin_memcpy(task.lse.data + head * task.lse.head_stride + query * task.lse.row_stride,
                     &lse, sizeof(lse));
  }

  static Scalar first_lane(Vec x) {
    Scalar lanes[Vectors::kLanes];
    Vectors::store(lanes, x);
    return lanes[0];
  }
};

}  // namespace
}  // namespace numattn
