// The stages by themselves: logits, or weights, as arrays [query][key], and how much weight each
// key gets. The same first stage and options as in prefill.h, without values.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/softmax/exp.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/table.h"

namespace numattn {
namespace {

template <class Simd, class Element>
struct Pattern {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  using Unit = typename Simd::Unit;
  using Single = typename Simd::Single;
  static constexpr int kRowsPerTile = Simd::kTileVectors * Simd::kLanes;

  struct Tile {
    int64_t first_row, rows;
  };

  struct Scratch {
    Unit* queries;     // [unit of d][lane], negated where the scale is negative
    Scalar* logits;    // [key][lane], then weights
    Scalar* maximum;   // [lane], of the logits that the softmax sees
    Scalar* sum;       // [lane]
    Scalar* factor;    // [lane], 1 / sum, for Stage::received
    Scalar* rescale;   // [lane], of no use without values
    Scalar* highest;   // [lane]
    Unit* k_copy;      // [key][unit of d]
    double* received;  // [key of the chunk]
  };

  static Scratch lay_out(Arena& arena, int64_t head_dim) {
    Scratch scratch;
    arena.take(scratch.queries, units_of<Simd>(head_dim) * kRowsPerTile);
    arena.take(scratch.logits, int64_t{kKeysPerBlock} * kRowsPerTile);
    arena.take(scratch.maximum, kRowsPerTile);
    arena.take(scratch.sum, kRowsPerTile);
    arena.take(scratch.factor, kRowsPerTile);
    arena.take(scratch.rescale, kRowsPerTile);
    arena.take(scratch.highest, kRowsPerTile);
    arena.take(scratch.k_copy, kKeysPerBlock * units_of<Simd>(head_dim));
    arena.take(scratch.received, kKeysPerChunk);
    return scratch;
  }
  static int64_t scratch_bytes(int64_t head_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, head_dim);
    return arena.used;
  }

  // ---- a tile of queries ------------------------------------------------------------------------

  static double sink_of(const Task& task) { return task.sinks ? *task.sinks : -__builtin_inf(); }

  // In the softmax's terms: what maximum and sum begin with, or what was kept of them.
  static void begin(const Task& task, const Tile& tile, const Scratch& scratch) {
    const double sink = sink_of(task);
    for (int lane = 0; lane < kRowsPerTile; ++lane) {
      Scalar maximum = 0;
      Scalar sum = 0;
      if (lane < tile.rows && (task.stage == Stage::statistics || task.stage == Stage::weights)) {
        maximum = static_cast<Scalar>(sink);
        sum = sink > -__builtin_inf() ? Scalar{1} : Scalar{0};
      } else if (lane < tile.rows && task.stage == Stage::received) {
        const int64_t row = tile.first_row + lane;
        maximum = static_cast<const Scalar*>(task.maximum)[row];
        sum = static_cast<const Scalar*>(task.sum)[row];
      }
      scratch.maximum[lane] = maximum;
      scratch.sum[lane] = sum;
      scratch.factor[lane] = sum == 0 ? Scalar{0} : Scalar{1} / sum;
    }
  }

  static void keep_statistics(const Task& task, const Tile& tile, const Scratch& scratch) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      static_cast<Scalar*>(task.maximum)[tile.first_row + row] = scratch.maximum[row];
      static_cast<Scalar*>(task.sum)[tile.first_row + row] = scratch.sum[row];
    }
  }

  // ---- a tile and a block of keys --------------------------------------------------------------

  template <int kVectors>
  static void find_logits(const Task& task, const Tile& tile, const Scratch& scratch,
                          const KeySpan& keys) {
    const KeyBlock<Unit> k =
        task.k.is_int8 ? key_units<Simd, Int8>(task.k, keys.first, keys.count, scratch.k_copy)
                       : key_units<Simd, Element>(task.k, keys.first, keys.count, scratch.k_copy);
    KeySteps<kVectors> all;
    for (int64_t& end : all.ends) end = keys.count;
    qk_matmul<Simd, kVectors>(
        {k.data, k.stride, 0, scratch.queries, units_of<Simd>(task.head_dim), false, nullptr}, all,
        scratch.logits);
    apply_options<Single, Element, kVectors>(task, tile, keys, scratch.logits);
    // Lanes without a query get no weight, whatever the options made of their zeros.
    const bool counts_lanes = task.stage == Stage::received && tile.rows < kVectors * Simd::kLanes;
    if (keys.within_limits && keys.mask_is_full && !counts_lanes) return;
    uint64_t attended[kKeysPerBlock];
    find_attended(task, tile, keys, attended);
    apply_mask<Single, kVectors>(scratch.logits, keys.count, attended);
  }

  // exp2(factor * (logit - maximum)) / sum, in place.
  template <int kVectors>
  static void find_weights(const Task& task, const Scratch& scratch, int64_t keys) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    const auto scale = Single::set(static_cast<Scalar>(softmax_scale(task) * kLog2E));
    const auto nothing = Single::set(-__builtin_inff());
    Vec base[kVectors], factor[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Vec maximum = Single::load(scratch.maximum + v * Simd::kLanes);
      base[v] = Single::select_equal(maximum, nothing, Single::zero(), maximum);
      factor[v] = Single::load(scratch.factor + v * Simd::kLanes);
    }
    for (int64_t key = 0; key < keys; ++key) {
      Vec weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec logit = Single::load(scratch.logits + key * kWidth + v * Simd::kLanes);
        weight[v] = Single::mul(Single::sub(logit, base[v]), scale);
      }
      exp2<Single>(weight);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Single::store(scratch.logits + key * kWidth + v * Simd::kLanes,
                      Single::mul(weight[v], factor[v]));
      }
    }
  }

  template <int kVectors>
  static void write(const Task& task, const Tile& tile, const Scratch& scratch,
                    const KeySpan& keys) {
    Scalar factor[kVectors * Simd::kLanes];
    for (Scalar& x : factor) x = 1;
    unpack_output<Single, Scalar, kVectors, false>(
        scratch.logits, factor, tile.rows, keys.count,
        task.out + tile.first_row * task.out_row_stride + keys.first * task.out_column_stride,
        task.out_row_stride, task.out_column_stride);
  }

  // What keys that no query of the tile attends to get.
  static void fill(const Task& task, const Tile& tile, int64_t begin, int64_t end) {
    const auto value = static_cast<Scalar>(task.stage == Stage::logits ? -__builtin_inf() : 0.0);
    for (int64_t row = tile.first_row; row < tile.first_row + tile.rows; ++row) {
      for (int64_t key = begin; key < end; ++key) {
        __builtin_memcpy(task.out + row * task.out_row_stride + key * task.out_column_stride,
                         &value, sizeof(value));
      }
    }
  }

  template <int kVectors>
  static void receive(const Scratch& scratch, int64_t keys, double* received) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    for (int64_t key = 0; key < keys; ++key) {
      Vec sum = Single::load(scratch.logits + key * kWidth);
      for (int v = 1; v < kVectors; ++v) {
        sum = Single::add(sum, Single::load(scratch.logits + key * kWidth + v * Simd::kLanes));
      }
      received[key] += static_cast<double>(Single::sum(sum));
    }
  }

  template <int kVectors>
  static void run_block(const Task& task, const Tile& tile, const Scratch& scratch,
                        const KeySpan& keys) {
    find_logits<kVectors>(task, tile, scratch, keys);
    if (task.stage == Stage::logits) {
      if (!scales_logits(task)) {
        apply_scale<Single, kVectors>(scratch.logits, keys.count,
                                      static_cast<Scalar>(softmax_scale(task)));
      }
      write<kVectors>(task, tile, scratch, keys);
    } else if (task.stage == Stage::statistics) {
      for (int lane = 0; lane < kVectors * Simd::kLanes; ++lane) {
        scratch.highest[lane] = scratch.maximum[lane];
      }
      find_highest<Single, kVectors>(scratch.logits, keys.count, scratch.highest);
      masked_softmax<Single, kVectors>(
          scratch.logits, keys.count, static_cast<Scalar>(softmax_scale(task) * kLog2E),
          scratch.highest, scratch.maximum, scratch.sum, scratch.rescale);
    } else if (task.stage == Stage::weights) {
      find_highest<Single, kVectors>(scratch.logits, keys.count, scratch.maximum);
      write<kVectors>(task, tile, scratch, keys);
    } else {
      find_weights<kVectors>(task, scratch, keys.count);
      receive<kVectors>(scratch, keys.count, scratch.received + (keys.first - task.keys_begin));
    }
  }

  // The logits that were written become weights, while the tile's rows are still in the cache if
  // they are not too long: a second pass through K instead would be twice the products and powers.
  static void weigh_rows(const Task& task, const Tile& tile, const Scratch& scratch, int64_t begin,
                         int64_t end) {
    const Vec scale = Single::set(static_cast<Scalar>(softmax_scale(task) * kLog2E));
    const Vec nothing = Single::set(-__builtin_inff());
    const auto sink = static_cast<Scalar>(sink_of(task));
    const int64_t stride = task.out_column_stride;
    for (int64_t row = 0; row < tile.rows; ++row) {
      char* const out = task.out + (tile.first_row + row) * task.out_row_stride;
      const Scalar maximum = scratch.maximum[row];
      const Vec base = Single::set(is_minus_infinity(maximum) ? Scalar{0} : maximum);
      const auto weigh = [&](Vec logits) {
        return exp2<Single>(Single::mul(Single::sub(logits, base), scale));
      };
      Scalar of_sink[Simd::kLanes];
      Single::store(of_sink, weigh(Single::set(sink)));
      double total = static_cast<double>(of_sink[0]);
      for (int64_t part = begin; part < end; part += kKeysPerChunk) {
        const int64_t part_end = end - part < kKeysPerChunk ? end : part + kKeysPerChunk;
        Vec sums = Single::zero();
        for (int64_t key = part; key < part_end; key += Simd::kLanes) {
          const int64_t count = part_end - key < Simd::kLanes ? part_end - key : Simd::kLanes;
          Vec logits = load_elements<Single, Scalar>(out + key * stride, stride, count);
          if (count < Simd::kLanes) {
            logits = Single::select_bits(lowest_bits(count), logits, nothing);
          }
          const Vec weights = weigh(logits);
          sums = Single::add(sums, weights);
          store_elements<Single, Scalar>(out + key * stride, stride, weights, count);
        }
        total += static_cast<double>(Single::sum(sums));
      }
      const auto sum = static_cast<Scalar>(total);
      const Vec factor = Single::set(sum == 0 ? Scalar{0} : Scalar{1} / sum);
      for (int64_t key = begin; key < end; key += Simd::kLanes) {
        const int64_t count = end - key < Simd::kLanes ? end - key : Simd::kLanes;
        const Vec weights = load_elements<Single, Scalar>(out + key * stride, stride, count);
        store_elements<Single, Scalar>(out + key * stride, stride, Single::mul(weights, factor),
                                       count);
      }
    }
  }

  // ---- the task ---------------------------------------------------------------------------------

  template <int kVectors>
  static bool run_tile(const Task& task, const Tile& tile, const Scratch& scratch) {
    const int64_t first_position = task.first_position + tile.first_row;
    const int64_t last_position = first_position + tile.rows - 1;
    const int64_t valid = task.keys_end < task.valid_keys ? task.keys_end : task.valid_keys;
    const auto clip = [&](int64_t key) {
      return key > valid ? valid : key < task.keys_begin ? task.keys_begin : key;
    };
    // Some query attends to a key from `begin` on, all do from `full_begin` on; likewise the ends.
    const int64_t begin = clip(first_position - task.window_left);
    const int64_t end = clip(last_position + task.window_right + 1);
    const int64_t full_begin = clip(last_position - task.window_left);
    const int64_t full_end = clip(first_position + task.window_right + 1);

    begin_tile<kVectors>(task, tile, scratch);
    for (int64_t first = begin; first < end;) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = (first / kKeysPerBlock + 1) * kKeysPerBlock;
      const int64_t last = block_end < end ? block_end : end;
      run_block<kVectors>(
          task, tile, scratch,
          {first, last - first, full_begin <= first && last <= full_end, task.mask == nullptr});
      first = last;
    }
    if (task.stage == Stage::statistics) keep_statistics(task, tile, scratch);
    if (task.stage == Stage::weights) weigh_rows(task, tile, scratch, begin, end);
    if (task.stage == Stage::logits || task.stage == Stage::weights) {
      fill(task, tile, task.keys_begin, begin < end ? begin : task.keys_end);
      if (begin < end) fill(task, tile, end, task.keys_end);
    }
    return true;
  }

  template <int kVectors>
  static void begin_tile(const Task& task, const Tile& tile, const Scratch& scratch) {
    pack_queries<Simd, Element, kVectors>(
        task.q + tile.first_row * task.q_row_stride, task.q_row_stride, task.q_column_stride,
        tile.rows, task.head_dim, task.scale < 0 ? Scalar{-1} : Scalar{1}, scratch.queries);
    begin(task, tile, scratch);
  }

  static bool run(const Task& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, task.head_dim);
    const int64_t received = task.stage == Stage::received ? task.keys_end - task.keys_begin : 0;
    for (int64_t i = 0; i < received; ++i) scratch.received[i] = 0;
    for (int64_t row = 0; row < task.queries; row += kRowsPerTile) {
      const int64_t left = task.queries - row;
      const Tile tile{row, left < kRowsPerTile ? left : kRowsPerTile};
      bool done = false;
      with_constant<Simd::kTileVectors>(
          (tile.rows + Simd::kLanes - 1) / Simd::kLanes,
          [&](auto vectors) { done = run_tile<vectors.value>(task, tile, scratch); });
      if (!done) return false;
    }
    for (int64_t i = 0; i < received; ++i) {
      const auto sum = static_cast<Scalar>(scratch.received[i]);
      __builtin_memcpy(task.out + (task.keys_begin + i) * task.out_row_stride, &sum, sizeof(sum));
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
