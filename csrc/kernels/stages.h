// Single stages: logits or weights as arrays [query][key], and how much weight each key receives.
// QK^T and options are the same as in prefill.h, without values.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_masks.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct Stages {
  using Vectors = typename Arithmetic::Vectors;
  using QkUnits = typename Arithmetic::QkUnits;
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;
  static constexpr int kVectorsPerTile = RegisterTile<Vectors>::kVectors;
  static constexpr int kQueriesPerTile = RegisterTile<Vectors>::kLanes;

  struct Scratch {
    typename QkUnits::Unit* queries;  // [unit of d][lane], negated if the scale is negative
    Scalar* logits;                   // [key][lane], then weights
    SoftmaxState<Scalar> state;
    Scalar* factor;                  // [lane], 1 / sum, for Stage::received
    Scalar* rescale;                 // [lane], written by the softmax; only values need it
    Scalar* highest;                 // [lane]
    typename QkUnits::Unit* k_copy;  // [key][unit of d]
    double* received;                // [key of the chunk]
  };

  static Scratch lay_out(Arena& arena, int64_t head_dim) {
    Scratch scratch;
    arena.take(scratch.queries, units_of<QkUnits>(head_dim) * kQueriesPerTile);
    arena.take(scratch.logits, int64_t{kKeysPerBlock} * kQueriesPerTile);
    arena.take(scratch.state.maximum, kQueriesPerTile);
    arena.take(scratch.state.sum, kQueriesPerTile);
    arena.take(scratch.factor, kQueriesPerTile);
    arena.take(scratch.rescale, kQueriesPerTile);
    arena.take(scratch.highest, kQueriesPerTile);
    arena.take(scratch.k_copy, kKeysPerBlock * units_of<QkUnits>(head_dim));
    arena.take(scratch.received, kKeysPerChunk);
    return scratch;
  }
  static int64_t scratch_bytes(int64_t head_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, head_dim);
    return arena.used;
  }

  static char* element(const Task& task, int64_t query, int64_t key) {
    return task.out.data + query * task.out.row_stride + key * task.out.column_stride;
  }

  // ---- a tile of queries ----------------------------------------------------------------------

  template <int kVectors>
  static void begin_tile(const Task& task, const QueryRows& rows, const Scratch& scratch) {
    const View& q = task.q;
    pack_queries<QkUnits, Element, kVectors>(
        q.data + rows.first_query * q.row_stride, q.row_stride, q.column_stride, rows.queries,
        task.head_dim, static_cast<Scalar>(query_sign(task)), scratch.queries);
    scratch.state.begin(kQueriesPerTile, sink_of(task, 0), 0);
    if (task.stage != Stage::received) return;
    for (int lane = 0; lane < kQueriesPerTile; ++lane) {
      const int64_t query = rows.first_query + lane;
      const bool is_there = lane < rows.queries;
      const auto kept = [&](const void* of) {
        return is_there ? static_cast<const Scalar*>(of)[query] : Scalar{0};
      };
      scratch.state.maximum[lane] = kept(task.maximum);
      scratch.factor[lane] = softmax_share(kept(task.sum));
    }
  }

  static void keep_statistics(const Task& task, const QueryRows& rows, const Scratch& scratch) {
    for (int64_t i = 0; i < rows.queries; ++i) {
      static_cast<Scalar*>(task.maximum)[rows.first_query + i] = scratch.state.maximum[i];
      static_cast<Scalar*>(task.sum)[rows.first_query + i] = scratch.state.sum[i];
    }
  }

  // Keys that no query of the tile attends to.
  static void fill(const Task& task, const QueryRows& rows, int64_t begin, int64_t end) {
    const auto value = static_cast<Scalar>(task.stage == Stage::logits ? -__builtin_inf() : 0.0);
    for (int64_t query = rows.first_query; query < rows.first_query + rows.queries; ++query) {
      for (int64_t key = begin; key < end; ++key) {
        __builtin_memcpy(element(task, query, key), &value, sizeof(value));
      }
    }
  }

  // ---- a tile and a block of keys -------------------------------------------------------------

  template <int kVectors>
  static void find_logits(const Task& task, const QueryRows& rows, const Scratch& scratch,
                          const KeySpan& keys) {
    using Map = TileMap<Vectors, kVectors>;
    const auto k = k_block<QkUnits, Element>(task.k, keys.first, keys.count, scratch.k_copy);
    qk_matmul<QkUnits, kVectors>(
        {k.data, k.stride, 0, scratch.queries, units_of<QkUnits>(task.head_dim)}, keys.count,
        scratch.logits);
    apply_options<Element>(task, Map{rows}, keys, scratch.logits);
    // Lanes without a query get no weight, whatever the options turned their zeros into.
    const bool counts_lanes = task.stage == Stage::received && rows.queries < Map::kLanes;
    if (keys.within_limits && keys.mask_is_full && !counts_lanes) return;
    uint64_t attended[kKeysPerBlock];
    find_attended<kKeysPerBlock>(task, rows, keys, attended);
    apply_mask<Map>(attended, keys.count, scratch.logits);
  }

  // Weights divided by their sum, in place.
  template <int kVectors>
  static void find_weights(const Task& task, const Scratch& scratch, int64_t keys) {
    constexpr int kWidth = kVectors * Vectors::kLanes;
    const auto scale = softmax_factor<Vectors>(softmax_scale(task));
    Vec base[kVectors], factor[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      base[v] = softmax_base<Vectors>(Vectors::load(scratch.state.maximum + v * Vectors::kLanes));
      factor[v] = Vectors::load(scratch.factor + v * Vectors::kLanes);
    }
    for (int64_t key = 0; key < keys; ++key) {
      Vec weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec logit = Vectors::load(scratch.logits + key * kWidth + v * Vectors::kLanes);
        weight[v] = Vectors::mul(Vectors::sub(logit, base[v]), scale);
      }
      exp2<Vectors>(weight);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vectors::store(scratch.logits + key * kWidth + v * Vectors::kLanes,
                       Vectors::mul(weight[v], factor[v]));
      }
    }
  }

  template <int kVectors>
  static void write(const Task& task, const QueryRows& rows, const Scratch& scratch,
                    const KeySpan& keys) {
    Scalar factor[kVectors * Vectors::kLanes];
    for (Scalar& x : factor) x = 1;
    unpack_output<Vectors, Scalar, kVectors, false>(
        scratch.logits, factor, rows.queries, keys.count,
        element(task, rows.first_query, keys.first), task.out.row_stride, task.out.column_stride);
  }

  template <int kVectors>
  static void receive(const Scratch& scratch, int64_t keys, double* received) {
    constexpr int kWidth = kVectors * Vectors::kLanes;
    for (int64_t key = 0; key < keys; ++key) {
      Vec sum = Vectors::load(scratch.logits + key * kWidth);
      for (int v = 1; v < kVectors; ++v) {
        sum = Vectors::add(sum, Vectors::load(scratch.logits + key * kWidth + v * Vectors::kLanes));
      }
      received[key] += static_cast<double>(Vectors::sum(sum));
    }
  }

  template <int kVectors>
  static void run_block(const Task& task, const QueryRows& rows, const Scratch& scratch,
                        const KeySpan& keys) {
    using Map = TileMap<Vectors, kVectors>;
    find_logits<kVectors>(task, rows, scratch, keys);
    if (task.stage == Stage::logits) {
      if (!scales_logits(task)) {
        apply_scale<Vectors>(scratch.logits, keys.count * Map::kLanes, softmax_scale(task));
      }
      write<kVectors>(task, rows, scratch, keys);
    } else if (task.stage == Stage::statistics) {
      for (int lane = 0; lane < Map::kLanes; ++lane) {
        scratch.highest[lane] = scratch.state.maximum[lane];
      }
      find_highest<Vectors, kVectors>(scratch.logits, keys.count, scratch.highest);
      add_block<ScalarUnits<Vectors>, kVectors>(scratch.logits, keys.count, softmax_scale(task), 0,
                                                scratch.highest, scratch.state, scratch.rescale);
    } else if (task.stage == Stage::weights) {
      find_highest<Vectors, kVectors>(scratch.logits, keys.count, scratch.state.maximum);
      write<kVectors>(task, rows, scratch, keys);
    } else {
      find_weights<kVectors>(task, scratch, keys.count);
      receive<kVectors>(scratch, keys.count, scratch.received + (keys.first - task.keys_begin));
    }
  }

  // Turns the written logits into weights, while the tile's rows are still in the cache if they are
  // not too long. A second pass through K would double products and powers.
  static void weigh_rows(const Task& task, const QueryRows& rows, const Scratch& scratch,
                         int64_t begin, int64_t end) {
    const Vec scale = softmax_factor<Vectors>(softmax_scale(task));
    const auto sink = static_cast<Scalar>(sink_of(task, 0));
    const int64_t stride = task.out.column_stride;
    for (int64_t i = 0; i < rows.queries; ++i) {
      char* const out = element(task, rows.first_query + i, 0);
      const Vec base = softmax_base_of<Vectors>(scratch.state.maximum[i]);
      Scalar of_sink[Vectors::kLanes];
      Vectors::store(of_sink, softmax_weight<Vectors>(Vectors::set(sink), base, scale));
      double total = static_cast<double>(of_sink[0]);
      for (int64_t chunk = begin; chunk < end; chunk += kKeysPerChunk) {
        const int64_t chunk_end = end - chunk < kKeysPerChunk ? end : chunk + kKeysPerChunk;
        Vec sums = Vectors::zero();
        for (int64_t key = chunk; key < chunk_end; key += Vectors::kLanes) {
          const int64_t count =
              chunk_end - key < Vectors::kLanes ? chunk_end - key : Vectors::kLanes;
          Vec logits = load_elements<Vectors, Scalar>(out + key * stride, stride, count);
          if (count < Vectors::kLanes) {
            const Vec nothing = Vectors::set(-__builtin_inff());
            logits = Vectors::select_bits(lowest_bits(count), logits, nothing);
          }
          const Vec weights = softmax_weight<Vectors>(logits, base, scale);
          sums = Vectors::add(sums, weights);
          store_elements<Vectors, Scalar>(out + key * stride, stride, weights, count);
        }
        total += static_cast<double>(Vectors::sum(sums));
      }
      const Vec factor = Vectors::set(softmax_share(static_cast<Scalar>(total)));
      for (int64_t key = begin; key < end; key += Vectors::kLanes) {
        const int64_t count = end - key < Vectors::kLanes ? end - key : Vectors::kLanes;
        const Vec weights = load_elements<Vectors, Scalar>(out + key * stride, stride, count);
        store_elements<Vectors, Scalar>(out + key * stride, stride, Vectors::mul(weights, factor),
                                        count);
      }
    }
  }

  // ---- the task -------------------------------------------------------------------------------

  template <int kVectors>
  static bool run_tile(const Task& task, const QueryRows& rows, const Scratch& scratch) {
    const int64_t valid = task.keys_end < task.valid_keys ? task.keys_end : task.valid_keys;
    const auto [begin, end, full_begin, full_end] = tile_keys(
        task.options, task.first_position + rows.first_query, rows.queries, task.keys_begin, valid);

    begin_tile<kVectors>(task, rows, scratch);
    for (int64_t first = begin, last; first < end; first = last) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = (first / kKeysPerBlock + 1) * kKeysPerBlock;
      last = block_end < end ? block_end : end;
      run_block<kVectors>(
          task, rows, scratch,
          {first, last - first, full_begin <= first && last <= full_end, mask_is_full(task, last)});
    }
    if (task.stage == Stage::statistics) keep_statistics(task, rows, scratch);
    if (task.stage == Stage::weights) weigh_rows(task, rows, scratch, begin, end);
    if (task.stage == Stage::logits || task.stage == Stage::weights) {
      fill(task, rows, task.keys_begin, begin < end ? begin : task.keys_end);
      if (begin < end) fill(task, rows, end, task.keys_end);
    }
    return true;
  }

  static bool run(const Task& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, task.head_dim);
    const int64_t received = task.stage == Stage::received ? task.keys_end - task.keys_begin : 0;
    for (int64_t i = 0; i < received; ++i) scratch.received[i] = 0;
    for (int64_t first = 0; first < task.queries; first += kQueriesPerTile) {
      const int64_t left = task.queries - first;
      const QueryRows rows{first, left < kQueriesPerTile ? left : kQueriesPerTile, 1};
      bool done = false;
      with_constant<kVectorsPerTile>(
          (rows.queries + Vectors::kLanes - 1) / Vectors::kLanes,
          [&](auto vectors) { done = run_tile<vectors.value>(task, rows, scratch); });
      if (!done) return false;
    }
    for (int64_t i = 0; i < received; ++i) {
      const auto sum = static_cast<Scalar>(scratch.received[i]);
      __builtin_memcpy(element(task, task.keys_begin + i, 0), &sum, sizeof(sum));
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
