// Attention for few queries and a chunk of keys: all query heads that share a KV head together, so
// that each byte of K and V is read once. The chunks of a head, fixed by the problem alone, are
// computed by any thread and merged in their order.
//
// Logits are [key][row], a row being a query of one of the heads (options/lane_map.h). The products
// come from row_products.h, until the rows fill the lanes.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/decode_scratch.h"
#include "kernels/decode_state.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_rows.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_masks.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/products/row_products.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct Decode {
  using Vectors = typename Arithmetic::Vectors;
  using QkUnits = typename Arithmetic::QkUnits;
  using ValueUnits = typename Arithmetic::ValueUnits;
  using Scalar = typename Vectors::Scalar;
  using QkUnit = typename QkUnits::Unit;
  using ValueUnit = typename ValueUnits::Unit;
  using Scratch = DecodeScratch<Arithmetic, Element>;
  using Head = typename Scratch::Head;
  static constexpr int kMaxRows = Scratch::kMaxRows;
  static constexpr int kTogether = kRowsTogether<Vectors>;

  // ---- QK^T -----------------------------------------------------------------------------------

  struct Keys : KeySpan {
    const char* const* k_rows;  // of the first KV head
    const char* const* v_rows;
  };

  // Calls `step` with the first key of each turn, and the number of its keys.
  template <class Step>
  static void for_turns(int64_t keys, int64_t keys_per_turn, Step step) {
    for (int64_t key = 0; key < keys; key += keys_per_turn) {
      step(key, keys - key < keys_per_turn ? keys - key : keys_per_turn);
    }
  }
  // Calls `step` with the first row of each group of rows and their number as a constant.
  template <class Step>
  static void for_rows(int64_t rows, Step step) {
    for (int64_t row = 0; row < rows; row += kTogether) {
      with_constant<kTogether>(rows - row, [&](auto together) { step(row, together); });
    }
  }

  // With rows in the lanes.
  template <int kWidth>
  static void multiply_lanes(const Head& head, const Scratch& scratch, int64_t first_key,
                             int64_t count, int64_t keys_ahead, Scalar* logits) {
    auto* const copy = reinterpret_cast<QkUnit*>(scratch.copies.elements);
    const auto k = k_block<QkUnits, Element>(head.task.k, first_key, count, copy);
    const int64_t ahead =
        k.data == copy ? 0 : keys_ahead * k.stride * static_cast<int64_t>(sizeof(QkUnit));
    qk_matmul<QkUnits, kWidth / Vectors::kLanes>(
        {k.data, k.stride, ahead, head.query_lanes, units_of<QkUnits>(head.task.head_dim)}, count,
        logits);
  }

  template <int kWidth>
  static void multiply_queries(const Task& task, const Scratch& scratch, const Keys& keys) {
    const int64_t rows = rows_of(task).count();
    const int64_t passes = Scratch::fills_lanes(rows) ? 1 : (rows + kTogether - 1) / kTogether;
    // Turns are whole register tiles.
    const int64_t tile = Scratch::fills_lanes(rows) ? 3 * kKeysPerTurn
                         : rows < kTogether         ? Vectors::kLanes / rows
                                                    : Vectors::kLanes / kTogether;
    const int64_t keys_per_turn =
        task.kv_heads > 1 ? (kKeysPerTurn + tile - 1) / tile * tile : kKeysPerDecodeBlock;
    for_turns(keys.count, keys_per_turn, [&](int64_t key, int64_t count) {
      FetchAhead fetch(task.k, task.kv_heads, keys.k_rows + key, count,
                       task.kv_heads * passes * count);
      for (int64_t i = 0; i < task.kv_heads; ++i) {
        const Head& head = scratch.heads[i];
        Scalar* const logits = head.logits + key * kWidth;
        if constexpr (Scratch::fills_lanes(kWidth)) {
          if (task.kv_heads > 1) fetch.next(static_cast<int>(count));
          multiply_lanes<kWidth>(head, scratch, keys.first + key, count,
                                 task.kv_heads > 1 ? 0 : keys_ahead(task.k, 1), logits);
        } else {
          with_rows<Vectors, Element>(task.k, keys.k_rows + key, i * task.k.rows.head_stride, count,
                                      scratch.copies,
                                      [&]<class Type>(const char* const* k, Stored<Type>) {
                                        for_rows(rows, [&](int64_t row, auto together) {
                                          qk_rows<QkUnits, Type, together.value>(
                                              k, count, fetch, head.queries + row * task.head_dim,
                                              task.head_dim, kWidth, logits + row);
                                        });
                                      });
        }
      }
    });
  }

  // ---- softmax --------------------------------------------------------------------------------

  template <class Map>
  static void weigh(const Head& head, const Scratch& scratch, const Keys& keys) {
    Scalar* const logits = head.logits;
    int64_t steps = Map::steps(keys.count);
    while (steps % ValueUnits::kElements != 0) ++steps;
    // Pad the last step with masked keys.
    for (int64_t i = keys.count * Map::kWidth; i < steps * Map::kLanes; ++i) {
      logits[i] = static_cast<Scalar>(-__builtin_inf());
    }
    // All lanes of a row share a maximum.
    Scalar* const highest = scratch.highest;
    for (int lane = 0; lane < Map::kLanes; ++lane) highest[lane] = head.state.maximum[lane];
    find_highest<Vectors, Map::kVectors>(logits, steps, highest);
    for (int lane = Map::kWidth; lane < Map::kLanes; ++lane) {
      Scalar& of_row = highest[Map::row(lane)];
      if (!(of_row > highest[lane])) of_row = highest[lane];
    }
    for (int lane = Map::kWidth; lane < Map::kLanes; ++lane)
      highest[lane] = highest[Map::row(lane)];
    add_block<ScalarUnits<Vectors>, Map::kVectors>(logits, steps, softmax_scale(head.task),
                                                   head.task.weight_exponent, highest, head.state,
                                                   head.rescale);
    if (head.task.v.scales.data) scale_keys<Map>(head.task.v, keys, logits);
    if constexpr (ValueUnits::kElements > 1) {
      static_assert(ValueUnits::kElements == 2);
      const auto order = ValueUnits::order_of_keys(Map::kWidth);
      auto* const weights = reinterpret_cast<ValueUnit*>(logits);
      for (int64_t step = 0; step < steps; step += ValueUnits::kElements) {
        for (int lane = 0; lane < Map::kLanes; lane += Vectors::kLanes) {
          const Scalar* const from = logits + step * Map::kLanes + lane;
          ValueUnits::store(
              weights + step / ValueUnits::kElements * Map::kLanes + lane,
              ValueUnits::join_keys(Vectors::load(from), Vectors::load(from + Map::kLanes), order));
        }
      }
    }
  }

  // ---- value aggregation ----------------------------------------------------------------------

  static void aggregate(const Task& task, const Scratch& scratch, const Keys& keys, int64_t width,
                        const uint64_t* attended) {
    // Their sum is added to the output. With one KV head their rows stay in the nearest cache for
    // all passes.
    constexpr int64_t kKeysPerSum = 32;
    static_assert(kKeysPerSum % kValuesPerTurn == 0);
    constexpr int kPerUnit = ValueUnits::kElements;
    const int64_t rows = rows_of(task).count();
    const int64_t passes = value_passes<ValueUnits>(rows, task.value_dim);
    Scalar ones[kMaxRows];
    for (Scalar& one : ones) one = 1;
    const int64_t keys_per_turn = task.kv_heads > 1 ? kValuesPerTurn : kKeysPerSum;
    for_turns(keys.count, keys_per_turn, [&](int64_t key, int64_t count) {
      const bool begins = key % kKeysPerSum == 0;
      const bool ends = (key + count) % kKeysPerSum == 0 || key + count == keys.count;
      FetchAhead fetch(task.v, task.kv_heads, keys.v_rows + key, count,
                       task.kv_heads * passes * units_of<ValueUnits>(count) * kPerUnit);
      for (int64_t i = 0; i < task.kv_heads; ++i) {
        const Head& head = scratch.heads[i];
        const auto* const weights =
            reinterpret_cast<const ValueUnit*>(head.logits) + key / kPerUnit * width;
        const Scalar* const rescale = key < kKeysPerSum ? head.rescale : ones;
        with_rows<Vectors, Element>(
            task.v, keys.v_rows + key, i * task.v.rows.head_stride, count, scratch.copies,
            [&]<class Type>(const char* const* v, Stored<Type>) {
              for_rows(rows, [&](int64_t row, auto together) {
                aggregate_rows<ValueUnits, Type, together.value>(
                    v, count, fetch, weights + row, width, attended ? attended + key : nullptr, row,
                    task.value_dim, rescale + row, {head.sums + row * task.value_dim, begins, ends},
                    head.state.output + row * task.value_dim);
              });
            });
      }
    });
  }

  // ---- one block of keys, then the chunk ------------------------------------------------------

  template <int kWidth>
  static void attend(const Task& task, const Scratch& scratch, Keys keys) {
    using Map = LaneMap<Vectors, kWidth>;
    const Map map{rows_of(task)};
    uint64_t bits[kKeysPerDecodeBlock];
    uint64_t* attended = bits;  // [key]
    const bool masked = !keys.within_limits || !keys.mask_is_full;
    if (masked) {
      find_attended<kKeysPerDecodeBlock>(task, map.rows, keys, attended);
      while (keys.count > 0 && attended[keys.count - 1] == 0) --keys.count;
      if (keys.count == 0) return;
      for (; attended[0] == 0; ++attended, ++keys.first, --keys.count) {
        ++keys.k_rows;
        ++keys.v_rows;
      }
    }
    multiply_queries<kWidth>(task, scratch, keys);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      const Head& head = scratch.heads[i];
      apply_options<Element>(head.task, map, keys, head.logits);
      if (masked) apply_mask<Map>(attended, keys.count, head.logits);
      weigh<Map>(head, scratch, keys);
    }
    const View& bias = task.options.bias;
    for (int64_t key = 0; !masked && bias.data && key < keys.count; ++key) {
      attended[key] = lowest_bits(map.rows.count());
    }
    if (bias.data) keep_unbiased<Element>(task.options, map.rows, keys, attended);
    aggregate(task, scratch, keys, kWidth, masked || bias.data ? attended : nullptr);
  }

  // The keys of task.tile_keys[0], into the states at task.state.
  static bool run(const Task& task) {
    const int64_t rows = rows_of(task).count();
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch =
        Scratch::lay_out(arena, task.kv_heads, rows, task.head_dim, task.value_dim);
    for (int64_t i = 0; i < task.kv_heads; ++i) scratch.heads[i].begin(task_of_head(task, i));

    const TileKeys& all = task.tile_keys[0];
    if (all.begin >= all.end) return true;
    find_rows(task.k, task.kv_heads, all.begin, all.end, scratch.k_rows);
    find_rows(task.v, task.kv_heads, all.begin, all.end, scratch.v_rows);
    for (int64_t first = all.begin, end; first < all.end; first = end) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = (first / kKeysPerDecodeBlock + 1) * kKeysPerDecodeBlock;
      end = block_end < all.end ? block_end : all.end;
      const Keys keys{{first, end - first, all.full_begin <= first && end <= all.full_end,
                       task.options.mask.data == nullptr},
                      scratch.k_rows + (first - all.begin),
                      scratch.v_rows + (first - all.begin)};
      with_power_of_two<kMaxRows>(width_of_rows(rows),
                                  [&](auto width) { attend<width.value>(task, scratch, keys); });
    }
    uint64_t overflowed = 0;  // a bit for each head
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      const auto& state = scratch.heads[i].state;
      state.find_largest(rows, task.value_dim);
      if (!(*state.largest < __builtin_inff())) overflowed |= uint64_t{1} << i;
    }
    for (int64_t i = 0; task.weight_exponent == 0 && overflowed >> i != 0; ++i) {
      if ((overflowed >> i & 1) == 0) continue;
      Task again = task_of_head(task, i);
      again.weight_exponent = exponent_for(all.end - all.begin);
      if (!run(again)) return false;
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
