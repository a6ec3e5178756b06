// Attention for few rows of queries and a chunk of keys. All query heads that share a KV head are
// computed together, so that each byte of K and V is read from memory once. First come the logits
// of all keys of the chunk, then their weights, then the sum of the values. The chunks of a head
// depend only on the problem; any thread computes them, and they are merged in order
// (decode_state.h).
//
// Logits are [key][row], where a row is a query of one of the heads (options/lane_map.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/decode_state.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_rows.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_masks.h"
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
  using ValueUnit = typename ValueUnits::Unit;
  using State = DecodeState<Vectors, Element>;
  // More rows are faster in tiles (decode_tiles.h). On Zen 3 with AVX2, tiles are 1.1 to 1.3 times
  // as fast for 12 rows of float32 and 1.4 to 1.7 times for 16 rows. Rows of 16 bits have to be
  // widened for tiles: there, 12 rows are 0.7 times as fast and 16 equally fast. 8 rows of float64
  // are 1.15 times as fast.
  static constexpr int kMostRows = sizeof(Element) == 2 ? 15 : sizeof(Element) == 4 ? 11 : 7;
  static constexpr int kMaxRows =
      kMostRows < 2 * Vectors::kLanes ? kMostRows : 2 * Vectors::kLanes - 1;
  static_assert(kMaxRows <= 64, "a lane mask has 64 bits");

  // One KV head, with the rows of its query heads.
  struct Head {
    Task task;
    State state;
    typename QkUnits::Element* queries;  // [row][d], negated if the scale is negative
    Scalar* logits;                      // [key][row], then weights
  };
  struct Scratch {
    Head* heads;  // [KV head]
    Scalar* highest;
    Scalar* rescale;     // [lane]
    uint64_t* attended;  // [key], a bit for each row
    char* copy;          // of a chunk of K or V, if their rows have gaps
    Scalar* sums;        // for qk_row_transposed
    char* zeros;         // a row of V
  };

  // Whether K is stored transposed and read in place, once for each row of queries. For many rows
  // that would take longer than a copy.
  static bool reads_transposed(const Task& task) {
    constexpr int64_t kMaxRowsOfTransposed = 4;
    return !task.k.is_int8 && is_transposed<Element>(task.k) &&
           rows_of(task).count() <= kMaxRowsOfTransposed;
  }

  static Scratch lay_out(Arena& arena, const Task& task) {
    const int64_t rows = rows_of(task).count();
    const int64_t lanes = lanes_of_rows<Vectors>(rows);
    Scratch scratch;
    arena.take(scratch.heads, task.kv_heads);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      Head counted;
      Head& head = scratch.heads ? scratch.heads[i] : counted;
      arena.take(head.queries, rows * task.head_dim);
      arena.take(head.logits, (kKeysPerChunk + 1) * width_of_rows(rows) + lanes);
    }
    arena.take(scratch.highest, lanes);
    arena.take(scratch.rescale, lanes);
    arena.take(scratch.attended, kKeysPerChunk);
    constexpr auto kSize = static_cast<int64_t>(sizeof(Element));
    const bool transposed = reads_transposed(task);
    int64_t dims = has_gaps<Element>(task.k) && !transposed ? task.head_dim : 0;
    if (has_gaps<Element>(task.v) && task.value_dim > dims) dims = task.value_dim;
    arena.take(scratch.copy, kKeysPerChunk * dims * kSize);
    arena.take(scratch.sums,
               transposed ? Vectors::kLanes * sums_of_lane<QkUnits>(kKeysPerChunk) : 0);
    arena.take(scratch.zeros, task.value_dim * kSize);
    return scratch;
  }
  static int64_t scratch_bytes(const Task& task) {
    Arena arena{nullptr, 0};
    lay_out(arena, task);
    return arena.used;
  }

  static void begin(const Task& task, Head& head) {
    head.task = task;
    const QueryRows rows = rows_of(task);
    head.state = State::at(task.state, rows.count(), task.value_dim);
    head.state.clear(rows.count(), task.value_dim, task.weight_exponent);
    const int64_t stride = task.q.column_stride;
    const auto sign = Vectors::set(static_cast<Scalar>(query_sign(task)));
    for (int64_t row = 0; row < rows.count(); ++row) {
      const char* const q =
          task.q.data + rows.head(row) * task.q.head_stride + rows.query(row) * task.q.row_stride;
      for (int64_t d = 0; d < task.head_dim; d += Vectors::kLanes) {
        const int64_t left = task.head_dim - d;
        const int64_t count = left < Vectors::kLanes ? left : Vectors::kLanes;
        const auto elements = load_elements<Vectors, Element>(q + d * stride, stride, count);
        store_up_to<Vectors>(head.queries + row * task.head_dim + d, Vectors::mul(elements, sign),
                             count);
      }
    }
  }

  // ---- QK^T -----------------------------------------------------------------------------------

  template <int kWidth>
  static void multiply_queries(const Task& task, const Scratch& scratch, const KeySpan& keys) {
    const int64_t rows = rows_of(task).count();
    if (reads_transposed(task)) {
      for (int64_t row = 0; row < rows; ++row) {
        qk_row_transposed<QkUnits, Element>(
            key_row(task.k, keys.first), task.k.rows.column_stride, keys.count,
            scratch.heads[0].queries + row * task.head_dim, task.head_dim, scratch.sums,
            scratch.heads[0].logits + row, kWidth);
      }
      return;
    }
    const ChunkRows k = chunk_rows<Vectors, Element>(task.k, keys.first, keys.count, scratch.copy);
    for_turns<Element>(
        k, keys.count,
        [&]<class Type>(Stored<Type>, const Parts& parts, int64_t turn,
                        const char* const* of_turn) {
          for (int64_t i = 0; i < task.kv_heads; ++i) {
            const Head& head = scratch.heads[i];
            const int64_t offset = i * task.k.rows.head_stride;
            Scalar* const logits = head.logits + (parts.first + turn) * kWidth;
            for_row_groups<Vectors>(rows, [&](int64_t row, auto together) {
              const auto* const queries = head.queries + row * task.head_dim;
              if (parts.count == kKeysPerTurn) {
                qk_rows<QkUnits, Type, together.value, kKeysPerTurn>(
                    of_turn, offset, queries, task.head_dim, logits + row, parts.keys * kWidth);
                return;
              }
              for (int key = 0; key < parts.count; ++key) {
                qk_rows<QkUnits, Type, together.value, 1>(of_turn + key, offset, queries,
                                                          task.head_dim,
                                                          logits + key * kWidth + row, kWidth);
              }
            });
          }
        });
  }

  // ---- softmax --------------------------------------------------------------------------------

  // `attended` is null if all rows attend to all keys.
  template <class Map>
  static void weigh(const Head& head, const Scratch& scratch, const KeySpan& keys,
                    const uint64_t* attended) {
    Scalar* const logits = head.logits;
    const int64_t steps = Map::steps(keys.count);
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
    for (int lane = Map::kWidth; lane < Map::kLanes; ++lane) {
      highest[lane] = highest[Map::row(lane)];
    }
    // In blocks, to keep the rounding error of the sum small.
    for (int64_t step = 0; step < steps; step += kKeysPerBlock) {
      add_block<ScalarUnits<Vectors>, Map::kVectors>(
          logits + step * Map::kLanes, steps - step < kKeysPerBlock ? steps - step : kKeysPerBlock,
          softmax_scale(head.task), head.task.weight_exponent, highest, head.state,
          scratch.rescale);
    }
    if (head.task.v.scales.data) {
      scale_keys<Map>(head.task.v, keys, logits);
      if (attended) apply_mask<Map>(attended, keys.count, logits, Scalar{0});
    }
    if constexpr (ValueUnits::kElements > 1) {
      for_parts(keys.count, [&](const Parts& parts) { join_weights(parts, Map::kWidth, logits); });
    }
  }

  // Turns weights [key][row] into [unit of a turn's keys][turn][row], in place.
  static void join_weights(const Parts& parts, int64_t width, Scalar* weights) {
    static_assert(ValueUnits::kElements <= 2);
    Scalar* const from = weights + parts.first * width;
    const int64_t of_part = parts.keys * width;
    for (int key = 0; key < parts.count; key += 2) {
      Scalar* const first = from + key * of_part;
      for (int64_t i = 0; i < of_part; i += Vectors::kLanes) {
        const typename Vectors::Vec pair[2] = {
            Vectors::load(first + i),
            key + 1 < parts.count ? Vectors::load(first + of_part + i) : Vectors::zero()};
        store_up_to<ValueUnits>(reinterpret_cast<ValueUnit*>(first) + i,
                                ValueUnits::join_rounded(pair), of_part - i);
      }
    }
  }

  // ---- value aggregation ----------------------------------------------------------------------

  // If `attended` is given, V may be NaN or infinite at keys that a row does not attend to. A
  // weight of 0 is not enough then: zeros replace these keys.
  static void aggregate(const Task& task, const Scratch& scratch, const ChunkRows& v, int64_t count,
                        const uint64_t* attended) {
    const int64_t rows = rows_of(task).count();
    const int64_t width = width_of_rows(rows);
    for_turns<Element>(
        v, count,
        [&]<class Type>(Stored<Type>, const Parts& parts, int64_t turn,
                        const char* const* of_turn) {
          for (int64_t i = 0; i < task.kv_heads; ++i) {
            const Head& head = scratch.heads[i];
            ValuesOfTurn<ValueUnits> values{
                of_turn,
                i * task.v.rows.head_stride,
                parts.count,
                reinterpret_cast<const ValueUnit*>(head.logits) + (parts.first + turn) * width,
                ValueUnits::kElements * parts.keys * width,
                task.value_dim};
            if (!attended) {
              const auto* const weights = values.weights;
              for_row_groups<Vectors>(rows, [&](int64_t row, auto together) {
                values.weights = weights + row;
                aggregate_rows<ValueUnits, Type, together.value>(
                    values, head.state.output + row * task.value_dim);
              });
              continue;
            }
            const char* of_row[kKeysPerTurn];
            for (int64_t row = 0; row < rows; ++row, ++values.weights) {
              for (int key = 0; key < parts.count; ++key) {
                const uint64_t by = attended[parts.first + key * parts.keys + turn];
                of_row[key] = by >> row & 1 ? of_turn[key] + values.offset : scratch.zeros;
              }
              ValuesOfTurn<ValueUnits> of_one = values;
              of_one.keys = of_row;
              of_one.offset = 0;
              aggregate_rows<ValueUnits, Type, 1>(of_one, head.state.output + row * task.value_dim);
            }
          }
        });
  }

  // Returns a bit for each head whose output is not finite.
  static uint64_t find_largest(const Task& task, const Scratch& scratch) {
    uint64_t not_finite = 0;
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      const State& state = scratch.heads[i].state;
      const bool is_finite = state.find_largest(0, rows_of(task).count(), task.value_dim);
      if (!is_finite) not_finite |= uint64_t{1} << i;
    }
    return not_finite;
  }

  // ---- the chunk ------------------------------------------------------------------------------

  // Clears the bits that limits and the dense mask exclude, and removes keys at either end of
  // `keys` that no row attends to.
  static uint64_t* find_attended_keys(const Task& task, uint64_t* attended, KeySpan& keys) {
    for (int64_t key = 0; key < keys.count; key += kKeysPerBlock) {
      KeySpan block = keys;
      block.first += key;
      block.count = keys.count - key < kKeysPerBlock ? keys.count - key : kKeysPerBlock;
      find_attended<kKeysPerBlock>(task, rows_of(task), block, attended + key);
    }
    while (keys.count > 0 && attended[keys.count - 1] == 0) --keys.count;
    for (; keys.count > 0 && *attended == 0; ++attended, ++keys.first) --keys.count;
    return attended;
  }

  // Returns a bit for each head whose output is not finite.
  template <int kWidth>
  static uint64_t attend(const Task& task, const Scratch& scratch, KeySpan keys) {
    using Map = LaneMap<Vectors, kWidth>;
    const Map map{rows_of(task)};
    const bool masked = !keys.within_limits || !keys.mask_is_full;
    uint64_t* attended = scratch.attended;
    if (masked) attended = find_attended_keys(task, attended, keys);
    if (keys.count == 0) return 0;
    multiply_queries<kWidth>(task, scratch, keys);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      const Head& head = scratch.heads[i];
      if (!has_plain_logits(head.task)) apply_options<Element>(head.task, map, keys, head.logits);
      if (masked) apply_mask<Map>(attended, keys.count, head.logits);
      weigh<Map>(head, scratch, keys, masked ? attended : nullptr);
    }
    const ChunkRows v = chunk_rows<Vectors, Element>(task.v, keys.first, keys.count, scratch.copy);
    aggregate(task, scratch, v, keys.count, nullptr);
    uint64_t not_finite = find_largest(task, scratch);
    const View& bias = task.options.bias;
    if (not_finite == 0 || !(masked || bias.data)) return not_finite;
    for (int64_t key = 0; !masked && key < keys.count; ++key) {
      attended[key] = lowest_bits(map.rows.count());
    }
    if (bias.data) keep_unbiased<Element>(task.options, map.rows, keys, attended);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      scratch.heads[i].state.clear_output(map.rows.count(), task.value_dim);
    }
    __builtin_memset(scratch.zeros, 0, static_cast<size_t>(task.value_dim) * sizeof(Element));
    aggregate(task, scratch, v, keys.count, attended);
    return find_largest(task, scratch);
  }

  // Adds the keys of task.tile_keys[0] to the states at task.state.
  static bool run(const Task& task) {
    if (task.should_stop(task.stop_context)) return false;
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, task);
    for (int64_t i = 0; i < task.kv_heads; ++i) begin(task_of_head(task, i), scratch.heads[i]);
    const TileKeys& all = task.tile_keys[0];
    if (all.begin >= all.end) return true;
    const KeySpan keys{all.begin, all.end - all.begin,
                       all.full_begin <= all.begin && all.end <= all.full_end,
                       mask_is_full(task, all.end)};
    uint64_t not_finite = 0;
    with_power_of_two<width_of_rows(kMaxRows)>(
        width_of_rows(rows_of(task).count()),
        [&](auto width) { not_finite = attend<width.value>(task, scratch, keys); });
    for (int64_t i = 0; task.weight_exponent == 0 && not_finite >> i != 0; ++i) {
      if ((not_finite >> i & 1) == 0) continue;
      Task again = task_of_head(task, i);
      again.weight_exponent = exponent_for(keys.count);
      if (!run(again)) return false;
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
