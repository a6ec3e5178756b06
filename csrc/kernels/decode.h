// Attention for few queries and a chunk of keys: all query heads that share a head of K and V
// together, so that each byte of K and V is read once. The chunks of a head, fixed by the problem
// alone, are computed by whichever thread comes, and merged in their order.
//
// Logits are [key][row], a row being a query of one of the heads. As in prefill.h they are vectors
// of lanes that belong to rows, so that options, masks and softmax are the same code; but where
// there are few rows a vector has those of several keys. The first and the third stage are those of
// row_products.h.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/decode_state.h"
#include "kernels/memory/key_rows.h"
#include "kernels/options/lane_masks.h"
#include "kernels/options/logits.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/products/row_products.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/table.h"

namespace numattn {
namespace {

template <class Simd, class Element>
struct Decode {
  using Single = typename Simd::Single;
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  using UnitElement = typename Simd::UnitElement;
  using State = DecodeState<Single, Element>;
  static constexpr int kMaxVectors = 2;
  static constexpr int kMaxRows = kMaxVectors * Simd::kLanes;
  static_assert(kMaxRows <= 64, "a lane mask has 64 bits");

  // A head of K and V, with the rows of its query heads.
  struct Head {
    Task task;
    State state;
    UnitElement* queries;              // [row][d], negated where the scale is negative
    typename Simd::Unit* query_lanes;  // [unit of d][row], where the rows fill the lanes
    Scalar* logits;   // [key][row], then weights [unit of keys][row]; each key's has `width`
    Scalar* rescale;  // [lane]
    Scalar* sums;     // [row][d], of values that come in pieces
  };
  struct Scratch {
    Head* heads;          // [head of K and V]
    Scalar* highest;      // [lane]
    const char** k_rows;  // [key of the chunk], and more to be fetched ahead
    const char** v_rows;
    char* copy;                // of one block of K or V, where it cannot be read in place
    const char** copied_rows;  // [key]: rows in the copy, or those of another head than the first
  };

  // Then the first stage is that of prefill, with rows in the lanes.
  static constexpr bool fills_lanes(int64_t rows) {
    return width_of_rows(rows) >= Simd::kLanes && width_of_rows(rows) > kRowsTogether<Simd>;
  }

  static Scratch lay_out(Arena& arena, int64_t kv_heads, int64_t rows, int64_t head_dim,
                         int64_t value_dim) {
    constexpr int64_t kPointers = kKeysPerChunk + kKeysPerDecodeBlock;
    Scratch scratch;
    arena.take(scratch.heads, kv_heads);
    for (int64_t i = 0; i < kv_heads; ++i) {
      Head counted;
      Head& head = scratch.heads ? scratch.heads[i] : counted;
      arena.take(head.queries, rows * head_dim);
      arena.take(head.query_lanes,
                 fills_lanes(rows) ? units_of<Simd>(head_dim) * width_of_rows(rows) : 0);
      arena.take(head.logits, kKeysPerDecodeBlock * width_of_rows(rows));
      arena.take(head.rescale, lanes_of_rows<Simd>(rows));
      arena.take(head.sums, kv_heads > 1 ? rows * value_dim : 0);
    }
    arena.take(scratch.highest, lanes_of_rows<Simd>(rows));
    arena.take(scratch.k_rows, kPointers);
    arena.take(scratch.v_rows, kPointers);
    arena.take(scratch.copied_rows, kKeysPerDecodeBlock);
    const int64_t dims = head_dim > value_dim ? head_dim : value_dim;
    arena.take(scratch.copy, kKeysPerDecodeBlock * units_of<Simd>(dims) *
                                 static_cast<int64_t>(sizeof(typename Simd::Unit)));
    return scratch;
  }
  static int64_t scratch_bytes(int64_t kv_heads, int64_t rows, int64_t head_dim,
                               int64_t value_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, kv_heads, rows, head_dim, value_dim);
    return arena.used;
  }

  // ---- one block of keys ----------------------------------------------------------------------

  struct Keys {
    const char* const* k_rows;  // of the first head
    const char* const* v_rows;
    int64_t first, count;
    bool within_limits;
  };

  // Calls `step` with the first key of each part of a block, and the number of its keys.
  template <class Step>
  static void for_parts(int64_t keys, int64_t keys_per_part, Step step) {
    for (int64_t key = 0; key < keys; key += keys_per_part) {
      step(key, keys - key < keys_per_part ? keys - key : keys_per_part);
    }
  }

  // How logits [key][row] lie in vectors: kVectors for each step of kKeysPerStep keys.
  template <int kWidth>
  struct Lanes {
    static constexpr int kVectors = kWidth < Simd::kLanes ? 1 : kWidth / Simd::kLanes;
    static constexpr int kKeysPerStep = kWidth < Simd::kLanes ? Simd::kLanes / kWidth : 1;
    static int64_t steps(int64_t keys) { return (keys + kKeysPerStep - 1) / kKeysPerStep; }
  };

  // attended [key]: bit i for row i, which is query i % queries of head i / queries.
  static void find_attended(const Task& task, const Keys& keys, uint64_t* attended) {
    uint64_t of_one_head[kKeysPerDecodeBlock];
    for (int64_t key = 0; key < keys.count; ++key) of_one_head[key] = lowest_bits(task.queries);
    if (!keys.within_limits) {
      keep_within_window(of_one_head, keys.first, keys.count, task.first_position, task.window_left,
                         task.window_right);
    }
    for (int64_t key = 0; key < keys.count; ++key) attended[key] = 0;
    for (int64_t head = 0; head < task.heads; ++head) {
      uint64_t bits[kKeysPerDecodeBlock];
      for (int64_t key = 0; key < keys.count; ++key) bits[key] = of_one_head[key];
      if (task.mask) {
        keep_unmasked<kKeysPerDecodeBlock>(
            bits, keys.count,
            task.mask + head * task.mask_head_stride + keys.first * task.mask_column_stride,
            task.mask_row_stride, task.mask_column_stride, task.queries);
      }
      for (int64_t key = 0; key < keys.count; ++key) {
        attended[key] |= bits[key] << (head * task.queries);
      }
    }
  }

  static const char* bias_of(const Task& task, const Keys& keys, int64_t head) {
    return task.bias + head * task.bias_head_stride + keys.first * task.bias_column_stride;
  }

  // Numbers [key][row] times the scale of each key.
  template <int kWidth>
  static void scale_rows(const KeyRows& rows, const Keys& keys, Scalar* numbers) {
    for (int64_t key = 0; key < keys.count; ++key) {
      const Scalar scale = key_scale(rows, keys.first + key);
      for (int row = 0; row < kWidth; ++row) numbers[key * kWidth + row] *= scale;
    }
  }

  template <int kWidth>
  static void apply_options(const Task& task, const Keys& keys, Scalar* logits) {
    using In = Lanes<kWidth>;
    const int64_t steps = In::steps(keys.count);
    if (task.k.scales) scale_rows<kWidth>(task.k, keys, logits);
    if (scales_logits(task)) {
      apply_scale<Single, In::kVectors>(logits, steps,
                                        static_cast<Scalar>(__builtin_fabs(task.scale)));
    }
    if (task.softcap > 0) {
      apply_softcap<Single, In::kVectors>(logits, steps, static_cast<Scalar>(task.softcap));
    }
    if (task.bias) {
      with_bias_type<Element>(task, [&]<class Bias>(Bias*) {
        for (int64_t row = 0; row < rows_of(task); ++row) {
          add_bias_of_row<Single, Bias>(
              logits + row, kWidth, keys.count,
              bias_of(task, keys, row / task.queries) + row % task.queries * task.bias_row_stride,
              task.bias_column_stride);
        }
      });
    }
    if (has_alibi(task)) {
      constexpr int kLanes = In::kVectors * Simd::kLanes;
      Scalar slopes[kLanes] = {};
      Scalar distances[kLanes] = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = lane % kWidth;
        if (row >= rows_of(task)) continue;
        const int64_t first_key = keys.first + lane / kWidth;
        slopes[lane] = static_cast<Scalar>(task.alibi_slopes[row / task.queries]);
        distances[lane] = static_cast<Scalar>(task.first_position + row % task.queries - first_key);
      }
      add_alibi<Single, In::kVectors>(logits, steps, In::kKeysPerStep, slopes, distances);
    }
  }

  template <int kWidth>
  static void apply_mask_of_rows(const uint64_t* attended, int64_t keys, Scalar* logits) {
    using In = Lanes<kWidth>;
    uint64_t lanes[kKeysPerDecodeBlock];  // [step]: a bit for each lane
    for (int64_t step = 0; step < In::steps(keys); ++step) {
      lanes[step] = 0;
      for (int i = 0; i < In::kKeysPerStep; ++i) {
        const int64_t key = step * In::kKeysPerStep + i;
        if (key < keys) lanes[step] |= attended[key] << (i * kWidth % 64);
      }
    }
    apply_mask<Single, In::kVectors>(logits, In::steps(keys), lanes);
  }

  // The logits become weights.
  template <int kWidth>
  static void weigh(const Head& head, const Scratch& scratch, const Keys& keys) {
    using In = Lanes<kWidth>;
    constexpr int kLanes = In::kVectors * Simd::kLanes;
    const Task& task = head.task;
    const State& state = head.state;
    Scalar* const logits = head.logits;
    int64_t steps = In::steps(keys.count);
    while (steps % Simd::kUnitElements != 0) ++steps;
    // What is there beyond the last key attends to nothing.
    for (int64_t i = keys.count * kWidth; i < steps * kLanes; ++i) {
      logits[i] = static_cast<Scalar>(-__builtin_inf());
    }
    Scalar* const highest = scratch.highest;
    for (int lane = 0; lane < kLanes; ++lane) highest[lane] = state.maximum[lane];
    find_highest<Single, In::kVectors>(logits, steps, highest);
    for (int lane = kWidth; lane < kLanes; ++lane) {
      Scalar& of_row = highest[lane % kWidth];
      if (!(of_row > highest[lane])) of_row = highest[lane];
    }
    for (int lane = kWidth; lane < kLanes; ++lane) highest[lane] = highest[lane % kWidth];
    masked_softmax<Single, In::kVectors>(logits, steps,
                                         static_cast<Scalar>(softmax_scale(task) * kLog2E), highest,
                                         state.maximum, state.sum, head.rescale);
    if (task.v.scales) scale_rows<kWidth>(task.v, keys, logits);
    if constexpr (Simd::kUnitElements > 1) {
      const auto order = Simd::order_of_keys(kWidth);
      auto* const weights = reinterpret_cast<typename Simd::Unit*>(logits);
      for (int64_t step = 0; step < steps; step += Simd::kUnitElements) {
        for (int lane = 0; lane < kLanes; lane += Simd::kLanes) {
          const auto* const from = logits + step * kLanes + lane;
          Simd::store(weights + step / Simd::kUnitElements * kLanes + lane,
                      Simd::join_keys(Simd::load(from), Simd::load(from + kLanes), order));
        }
      }
    }
  }

  // Calls `step` with the first row of each group of rows and their number as a constant.
  template <class Step>
  static void for_rows(int64_t rows, Step step) {
    for (int64_t row = 0; row < rows; row += kRowsTogether<Simd>) {
      with_constant<kRowsTogether<Simd>>(rows - row, [&](auto together) { step(row, together); });
    }
  }

  // Calls `use` with the rows of some keys of a head, and the type of their elements as a null
  // pointer. Those of the first head begin at `of_first_head`, `offset` bytes before.
  template <class Use>
  static void with_rows(const KeyRows& rows, const char* const* of_first_head, int64_t offset,
                        int64_t count, const Scratch& scratch, Use use) {
    const char* const* const moved = scratch.copied_rows;
    const auto with_layout = [&]<class Stored>(Stored* stored) {
      constexpr auto kSize = static_cast<int64_t>(sizeof(Stored));
      if (rows.column_stride != kSize) {  // then there are no other heads
        gather_rows(of_first_head, count, rows.dims, rows.column_stride, kSize, scratch.copy,
                    scratch.copied_rows);
        return use(moved, stored);
      }
      if (offset == 0) return use(of_first_head, stored);
      for (int64_t i = 0; i < count; ++i) scratch.copied_rows[i] = of_first_head[i] + offset;
      use(moved, stored);
    };
    if (rows.is_int8) {
      with_layout(static_cast<Int8*>(nullptr));
    } else {
      with_layout(static_cast<Element*>(nullptr));
    }
  }

  // The first stage, with rows in the lanes.
  template <int kWidth>
  static void multiply_lanes(const Head& head, const Scratch& scratch, int64_t first_key,
                             int64_t count, int64_t keys_ahead, Scalar* logits) {
    using Unit = typename Simd::Unit;
    constexpr int kVectors = Lanes<kWidth>::kVectors;
    const KeyRows& rows = head.task.k;
    auto* const copy = reinterpret_cast<Unit*>(scratch.copy);
    const KeyBlock<Unit> k = rows.is_int8 ? key_units<Simd, Int8>(rows, first_key, count, copy)
                                          : key_units<Simd, Element>(rows, first_key, count, copy);
    KeySteps<kVectors> all;
    for (int64_t& end : all.ends) end = count;
    const int64_t ahead =
        k.data == copy ? 0 : keys_ahead * k.stride * static_cast<int64_t>(sizeof(Unit));
    qk_matmul<Simd, kVectors>({k.data, k.stride, ahead, head.query_lanes,
                               units_of<Simd>(head.task.head_dim), false, nullptr},
                              all, logits);
  }

  template <int kWidth>
  static void multiply_queries(const Task& task, const Scratch& scratch, const Keys& keys) {
    const int64_t rows = rows_of(task);
    const int64_t passes =
        fills_lanes(rows) ? 1 : (rows + kRowsTogether<Simd> - 1) / kRowsTogether<Simd>;
    // Whole register tiles, some kKeysTogether keys of them.
    const int64_t tile = fills_lanes(rows)            ? 3 * kKeysTogether
                         : rows < kRowsTogether<Simd> ? Simd::kLanes / rows
                                                      : Simd::kLanes / kRowsTogether<Simd>;
    const int64_t keys_per_part =
        task.kv_heads > 1 ? (kKeysTogether + tile - 1) / tile * tile : kKeysPerDecodeBlock;
    for_parts(keys.count, keys_per_part, [&](int64_t key, int64_t count) {
      FetchAhead fetch(task.k, task.kv_heads, keys.k_rows + key, count,
                       task.kv_heads * passes * count);
      for (int64_t i = 0; i < task.kv_heads; ++i) {
        const Head& head = scratch.heads[i];
        Scalar* const logits = head.logits + key * kWidth;
        if constexpr (fills_lanes(kWidth)) {
          if (task.kv_heads > 1) fetch.next(static_cast<int>(count));
          multiply_lanes<kWidth>(head, scratch, keys.first + key, count,
                                 task.kv_heads > 1 ? 0 : keys_ahead(task.k, 1), logits);
        } else {
          with_rows(task.k, keys.k_rows + key, i * task.k.head_stride, count, scratch,
                    [&]<class Stored>(const char* const* k, Stored*) {
                      for_rows(rows, [&](int64_t row, auto together) {
                        qk_rows<Simd, Stored, together.value>(k, count, fetch,
                                                              head.queries + row * task.head_dim,
                                                              task.head_dim, kWidth, logits + row);
                      });
                    });
        }
      }
    });
  }

  static void aggregate(const Task& task, const Scratch& scratch, const Keys& keys, int64_t width,
                        const uint64_t* attended) {
    // Their sum is added to the output; with one head their rows stay in the nearest cache for all
    // passes through them.
    constexpr int64_t kKeysPerSum = 32;
    static_assert(kKeysPerSum % kValuesTogether == 0);
    constexpr int kPerUnit = Simd::kUnitElements;
    const int64_t passes = value_passes<Simd>(rows_of(task), task.value_dim);
    Scalar ones[kMaxRows];
    for (Scalar& one : ones) one = 1;
    const int64_t keys_per_piece = task.kv_heads > 1 ? kValuesTogether : kKeysPerSum;
    for_parts(keys.count, keys_per_piece, [&](int64_t key, int64_t count) {
      const int64_t units = (count + kPerUnit - 1) / kPerUnit;
      const bool begins = key % kKeysPerSum == 0;
      const bool ends = (key + count) % kKeysPerSum == 0 || key + count == keys.count;
      FetchAhead fetch(task.v, task.kv_heads, keys.v_rows + key, count,
                       task.kv_heads * passes * units * kPerUnit);
      for (int64_t i = 0; i < task.kv_heads; ++i) {
        const Head& head = scratch.heads[i];
        const auto* const weights = reinterpret_cast<const typename Simd::Unit*>(head.logits);
        const Scalar* const rescale = key < kKeysPerSum ? head.rescale : ones;
        with_rows(task.v, keys.v_rows + key, i * task.v.head_stride, count, scratch,
                  [&]<class Stored>(const char* const* v, Stored*) {
                    for_rows(rows_of(task), [&](int64_t row, auto together) {
                      aggregate_rows<Simd, Stored, together.value>(
                          v, count, fetch, weights + key / kPerUnit * width + row, width,
                          attended ? attended + key : nullptr, row, task.value_dim, rescale + row,
                          {head.sums + row * task.value_dim, begins, ends},
                          head.state.output + row * task.value_dim);
                    });
                  });
      }
    });
  }

  template <int kWidth>
  static void attend(const Task& task, const Scratch& scratch, Keys keys) {
    uint64_t bits[kKeysPerDecodeBlock];
    uint64_t* attended = bits;
    const bool masked = !keys.within_limits || task.mask;
    if (masked) {
      find_attended(task, keys, attended);
      while (keys.count > 0 && attended[keys.count - 1] == 0) --keys.count;
      if (keys.count == 0) return;
      while (attended[0] == 0) {
        ++attended;
        ++keys.k_rows;
        ++keys.v_rows;
        ++keys.first;
        --keys.count;
      }
    }
    multiply_queries<kWidth>(task, scratch, keys);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      const Head& head = scratch.heads[i];
      apply_options<kWidth>(head.task, keys, head.logits);
      if (masked) apply_mask_of_rows<kWidth>(attended, keys.count, head.logits);
    }
    if (task.bias) {
      if (!masked) {
        for (int64_t key = 0; key < keys.count; ++key) attended[key] = lowest_bits(rows_of(task));
      }
      with_bias_type<Element>(task, [&]<class Bias>(Bias*) {
        for (int64_t head = 0; head < task.heads; ++head) {
          keep_unbiased<Bias>(attended, keys.count, bias_of(task, keys, head), task.bias_row_stride,
                              task.bias_column_stride, task.queries, head * task.queries);
        }
      });
    }
    for (int64_t i = 0; i < task.kv_heads; ++i) weigh<kWidth>(scratch.heads[i], scratch, keys);
    aggregate(task, scratch, keys, kWidth, masked || task.bias ? attended : nullptr);
  }

  // ---- the chunk ------------------------------------------------------------------------------

  static void begin(const Head& head) {
    const Task& task = head.task;
    const auto sign = Simd::Single::set(task.scale < 0 ? Scalar{-1} : Scalar{1});
    const int64_t rows = rows_of(task);
    for (int64_t row = 0; row < rows; ++row) {
      const char* const q =
          task.q + row / task.queries * task.q_head_stride + row % task.queries * task.q_row_stride;
      for (int64_t d = 0; d < task.head_dim; d += Simd::kLanes) {
        const int64_t left = task.head_dim - d;
        const int64_t count = left < Simd::kLanes ? left : Simd::kLanes;
        const Vec piece = load_elements<Single, Element>(q + d * task.q_column_stride,
                                                         task.q_column_stride, count);
        store_up_to<Simd>(head.queries + row * task.head_dim + d, Simd::mul(piece, sign), count);
      }
    }
    if (fills_lanes(rows)) {
      with_constant<kMaxVectors>(width_of_rows(rows) / Simd::kLanes, [&](auto vectors) {
        constexpr auto kSize = static_cast<int64_t>(sizeof(UnitElement));
        pack_queries<Simd, UnitElement, vectors.value>(reinterpret_cast<const char*>(head.queries),
                                                       task.head_dim * kSize, kSize, rows,
                                                       task.head_dim, 1, head.query_lanes);
      });
    }
    head.state.clear(rows, task.value_dim);
  }

  // What lies in task.tile_keys[0], into the states at task.state.
  static bool run(const Task& task) {
    const int64_t rows = rows_of(task);
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, task.kv_heads, rows, task.head_dim, task.value_dim);
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      Head& head = scratch.heads[i];
      head.task = task_of_head(task, i);
      head.state = State::at(head.task.state, rows, task.value_dim);
      begin(head);
    }

    const TileKeys& all = task.tile_keys[0];
    if (all.begin >= all.end) return true;
    find_rows(task.k, all.begin, all.end, scratch.k_rows);
    find_rows(task.v, all.begin, all.end, scratch.v_rows);
    Keys keys{scratch.k_rows, scratch.v_rows, all.begin, 0, false};
    for (; keys.first < all.end; keys.first += keys.count) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = (keys.first / kKeysPerDecodeBlock + 1) * kKeysPerDecodeBlock;
      keys.k_rows = scratch.k_rows + (keys.first - all.begin);
      keys.v_rows = scratch.v_rows + (keys.first - all.begin);
      keys.count = (block_end < all.end ? block_end : all.end) - keys.first;
      keys.within_limits = all.full_begin <= keys.first && keys.first + keys.count <= all.full_end;
      with_width<kMaxRows>(width_of_rows(rows),
                           [&](auto width) { attend<width.value>(task, scratch, keys); });
    }
    return true;
  }

  // Calls `step` with a power of two as a compile-time constant.
  template <int kMost, class Step>
  static void with_width(int64_t width, Step step) {
    if constexpr (kMost > 1) {
      if (width < kMost) return with_width<kMost / 2>(width, step);
    }
    step(Constant<kMost>{});
  }
};

}  // namespace
}  // namespace numattn
