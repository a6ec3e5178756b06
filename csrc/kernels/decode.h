// Attention for few queries and a chunk of keys: all query heads that share a head of K and V
// together, so that each byte of K and V is read once. The chunks of a head, fixed by the problem
// alone, are computed by whichever thread comes, and merged in their order.
//
// Logits are [key][row] as in prefill.h, so that options, masks and softmax are the same code; a
// row is a query of one of the heads. The first and the third stage are those of row_products.h.
#pragma once

#include <cstdint>

#include "constants.h"
#include "key_block.h"
#include "lane_masks.h"
#include "logits.h"
#include "masked_softmax.h"
#include "row_products.h"
#include "table.h"

namespace numattn {
namespace {

template <class Simd, class Element>
struct Decode {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  static constexpr int kMaxVectors = 2;
  static constexpr int kMaxRows = kMaxVectors * Simd::kLanes;
  static_assert(kMaxRows <= 64, "a lane mask has 64 bits");

  // What the softmax keeps of a chunk: for each row, padded to `width` lanes.
  struct State {
    Scalar* output;   // [row][d], not yet divided by the sum
    Scalar* maximum;  // [lane], of the logits that the softmax sees
    Scalar* sum;      // [lane]
  };

  struct Scratch {
    Scalar* queries;      // [row][d], negated where the scale is negative
    Scalar* logits;       // [key][lane], then weights
    Scalar* rescale;      // [lane]
    Scalar* highest;      // [lane]
    const char** k_rows;  // [key], and kKeysAhead more
    const char** v_rows;  // likewise
  };

  static int64_t rows_of(const Task& task) { return task.heads * task.queries; }
  static int64_t width_of(int64_t rows) {
    return (rows + Simd::kLanes - 1) / Simd::kLanes * Simd::kLanes;
  }

  static State state_at(Arena& arena, int64_t rows, int64_t value_dim) {
    State state;
    arena.take(state.output, rows * value_dim);
    arena.take(state.maximum, width_of(rows));
    arena.take(state.sum, width_of(rows));
    return state;
  }
  static int64_t state_bytes(int64_t rows, int64_t value_dim) {
    Arena arena{nullptr, 0};
    state_at(arena, rows, value_dim);
    return arena.used;
  }

  static Scratch lay_out(Arena& arena, int64_t rows, int64_t head_dim) {
    Scratch scratch;
    arena.take(scratch.queries, rows * head_dim);
    arena.take(scratch.logits, kKeysPerBlock * width_of(rows));
    arena.take(scratch.rescale, width_of(rows));
    arena.take(scratch.highest, width_of(rows));
    arena.take(scratch.k_rows, kKeysPerBlock + kKeysAhead);
    arena.take(scratch.v_rows, kKeysPerBlock + kKeysAhead);
    return scratch;
  }
  static int64_t scratch_bytes(int64_t rows, int64_t head_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, rows, head_dim);
    return arena.used;
  }

  // ---- one block of keys ----------------------------------------------------------------------

  struct Keys {
    const char** k_rows;
    const char** v_rows;
    int64_t first, count;
    bool within_limits;
  };

  // attended [key]: bit i for row i, which is query i % queries of head i / queries.
  static void find_attended(const Task& task, const Keys& keys, uint64_t* attended) {
    uint64_t of_one_head[kKeysPerBlock];
    for (int64_t key = 0; key < keys.count; ++key) of_one_head[key] = lowest_bits(task.queries);
    if (!keys.within_limits) {
      keep_within_window(of_one_head, keys.first, keys.count, task.first_position, task.window_left,
                         task.window_right);
    }
    for (int64_t key = 0; key < keys.count; ++key) attended[key] = 0;
    for (int64_t head = 0; head < task.heads; ++head) {
      uint64_t bits[kKeysPerBlock];
      for (int64_t key = 0; key < keys.count; ++key) bits[key] = of_one_head[key];
      if (task.mask) {
        keep_unmasked<kKeysPerBlock>(
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

  template <int kVectors>
  static void apply_options(const Task& task, const Keys& keys, Scalar* logits) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    if (task.k.scales) scale_keys<Simd, kVectors>(logits, keys.count, task.k, keys.first);
    if (scales_logits(task)) {
      apply_scale<Simd, kVectors>(logits, keys.count,
                                  static_cast<Scalar>(__builtin_fabs(task.scale)));
    }
    if (task.softcap > 0) {
      apply_softcap<Simd, kVectors>(logits, keys.count, static_cast<Scalar>(task.softcap));
    }
    if (task.bias) {
      with_bias_type<Element>(task, [&]<class Bias>(Bias*) {
        for (int64_t row = 0; row < rows_of(task); ++row) {
          add_bias_of_row<Simd, Bias>(
              logits + row, kWidth, keys.count,
              bias_of(task, keys, row / task.queries) + row % task.queries * task.bias_row_stride,
              task.bias_column_stride);
        }
      });
    }
    if (has_alibi(task)) {
      Scalar slopes[kWidth] = {};
      Scalar distances[kWidth] = {};
      for (int64_t row = 0; row < rows_of(task); ++row) {
        slopes[row] = static_cast<Scalar>(task.alibi_slopes[row / task.queries]);
        distances[row] = static_cast<Scalar>(task.first_position + row % task.queries - keys.first);
      }
      add_alibi<Simd, kVectors>(logits, keys.count, slopes, distances);
    }
  }

  // Calls `step` with the first row of each group of rows and their number as a constant.
  template <int kMost, class Step>
  static void for_rows(int64_t rows, Step step) {
    for (int64_t row = 0; row < rows; row += kMost) {
      with_constant<kMost>(rows - row, [&](auto together) { step(row, together); });
    }
  }

  // Calls `use` with the type of the elements of K or V and whether they stand side by side.
  template <class Use>
  static void with_elements(const KeyRows& rows, Use use) {
    const auto with_layout = [&]<class Stored>(Stored*) {
      if (rows.column_stride == static_cast<int64_t>(sizeof(Stored))) {
        use(static_cast<Stored*>(nullptr), Constant<1>{});
      } else {
        use(static_cast<Stored*>(nullptr), Constant<0>{});
      }
    };
    if (rows.is_int8) {
      with_layout(static_cast<Int8*>(nullptr));
    } else {
      with_layout(static_cast<Element*>(nullptr));
    }
  }

  static RowPointers pointers(const KeyRows& rows, const char* const* pointers) {
    return {pointers, rows.column_stride, rows.dims * rows.column_stride};
  }

  static void multiply_queries(const Task& task, const Scratch& scratch, const Keys& keys,
                               int64_t width) {
    const RowPointers k = pointers(task.k, keys.k_rows);
    with_elements(task.k, [&]<class Stored>(Stored*, auto side_by_side) {
      for_rows<kQkRows<Simd>>(rows_of(task), [&](int64_t row, auto together) {
        qk_rows<Simd, Stored, together.value, side_by_side.value == 1>(
            k, keys.count, row == 0, scratch.queries + row * task.head_dim, task.head_dim, width,
            scratch.logits + row);
      });
    });
  }

  static void aggregate(const Task& task, const Scratch& scratch, const State& state,
                        const Keys& keys, int64_t width, const uint64_t* attended) {
    const RowPointers v = pointers(task.v, keys.v_rows);
    with_elements(task.v, [&]<class Stored>(Stored*, auto side_by_side) {
      for_rows<kValueRows>(rows_of(task), [&](int64_t row, auto together) {
        uint64_t of_rows[kKeysPerBlock];
        for (int64_t i = 0; attended && i < keys.count; ++i) of_rows[i] = attended[i] >> row;
        aggregate_rows<Simd, Stored, together.value, side_by_side.value == 1>(
            v, keys.count, row == 0, scratch.logits + row, width, attended ? of_rows : nullptr,
            task.value_dim, scratch.rescale + row, state.output + row * task.value_dim);
      });
    });
  }

  template <int kVectors>
  static void attend(const Task& task, const Scratch& scratch, const State& state, Keys keys) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    uint64_t bits[kKeysPerBlock];
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
    for (int lane = 0; lane < kWidth; lane += Simd::kLanes) {
      Simd::store(scratch.highest + lane, Simd::load(state.maximum + lane));
    }
    multiply_queries(task, scratch, keys, kWidth);
    apply_options<kVectors>(task, keys, scratch.logits);
    if (masked) apply_mask<Simd, kVectors>(scratch.logits, keys.count, attended);
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
    find_highest<Simd, kVectors>(scratch.logits, keys.count, scratch.highest);
    masked_softmax<Simd, kVectors>(scratch.logits, keys.count,
                                   static_cast<Scalar>(softmax_scale(task) * kLog2E),
                                   scratch.highest, state.maximum, state.sum, scratch.rescale);
    if (task.v.scales) scale_keys<Simd, kVectors>(scratch.logits, keys.count, task.v, keys.first);
    aggregate(task, scratch, state, keys, kWidth, masked || task.bias ? attended : nullptr);
  }

  // ---- the chunk ------------------------------------------------------------------------------

  static void begin(const Task& task, const Scratch& scratch, const State& state) {
    const auto sign = Simd::set(task.scale < 0 ? Scalar{-1} : Scalar{1});
    const int64_t rows = rows_of(task);
    for (int64_t row = 0; row < rows; ++row) {
      const char* const q =
          task.q + row / task.queries * task.q_head_stride + row % task.queries * task.q_row_stride;
      for (int64_t d = 0; d < task.head_dim; d += Simd::kLanes) {
        const int64_t left = task.head_dim - d;
        const int64_t count = left < Simd::kLanes ? left : Simd::kLanes;
        const Vec piece =
            load_elements<Simd, Element>(q + d * task.q_column_stride, task.q_column_stride, count);
        store_up_to<Simd>(scratch.queries + row * task.head_dim + d, Simd::mul(piece, sign), count);
      }
    }
    for (int64_t i = 0; i < rows * task.value_dim; ++i) state.output[i] = 0;
    for (int64_t i = 0; i < width_of(rows); ++i) {
      state.maximum[i] = static_cast<Scalar>(-__builtin_inf());
      state.sum[i] = 0;
    }
  }

  // What lies in task.tile_keys[0], into the state at task.state.
  static bool run(const Task& task) {
    const int64_t rows = rows_of(task);
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, rows, task.head_dim);
    Arena state_arena{static_cast<char*>(task.state), 0};
    const State state = state_at(state_arena, rows, task.value_dim);
    begin(task, scratch, state);

    const TileKeys& all = task.tile_keys[0];
    Keys keys{scratch.k_rows, scratch.v_rows, 0, 0, false};
    for (int64_t first = all.begin; first < all.end; first += keys.count) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = (first / kKeysPerBlock + 1) * kKeysPerBlock;
      keys.first = first;
      keys.count = (block_end < all.end ? block_end : all.end) - first;
      keys.within_limits = all.full_begin <= first && first + keys.count <= all.full_end;
      for (int64_t i = 0; i < kKeysPerBlock + kKeysAhead; ++i) {
        const int64_t key = first + i < all.end ? first + i : all.end - 1;
        keys.k_rows[i] = key_row(task.k, key);
        keys.v_rows[i] = key_row(task.v, key);
      }
      with_constant<kMaxVectors>(width_of(rows) / Simd::kLanes, [&](auto vectors) {
        attend<vectors.value>(task, scratch, state, keys);
      });
    }
    return true;
  }

  // ---- the end --------------------------------------------------------------------------------

  // Merges the states of a task's chunks, which stand side by side, and writes out and lse. The
  // first state is overwritten.
  static void finish(const Task& task, void* states, int64_t count, int64_t bytes) {
    const int64_t rows = rows_of(task);
    const auto state_of = [&](int64_t chunk) {
      Arena arena{static_cast<char*>(states) + chunk * bytes, 0};
      return state_at(arena, rows, task.value_dim);
    };
    const State merged = state_of(0);
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
        const State state = state_of(chunk);
        const Vec factor = power(state.maximum[row]);
        sum += state.sum[row] * first_lane(factor);
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
