// Attention for tiles of queries: keys come in blocks, and each block goes through the three
// stages for each tile before the next one is read. The lanes of every vector are queries.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_masks.h"
#include "kernels/options/logits.h"
#include "kernels/products/key_steps.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/products/value_aggregation.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/table.h"
#include "kernels/tile.h"

namespace numattn {
namespace {

// Elements are what the arrays q, k, v and out hold. Simd says what is computed with: scalars, and
// the units of the matrix products (simd/scalar_units.h).
template <class Simd, class Element>
struct Prefill {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  using Unit = typename Simd::Unit;
  using Tile = numattn::Tile<Simd, Element>;
  using Single = typename Simd::Single;  // the same vectors, one element at a time
  static constexpr int kPerUnit = Simd::kUnitElements;
  static constexpr int kRowsPerTile = Tile::kMaxRows;
  static_assert(kRowsPerTile <= 64, "a lane mask has 64 bits");
  static_assert(kKeysPerBlock % kPerUnit == 0, "units of keys don't depend on blocks");
  static_assert(sizeof(Unit) == sizeof(Scalar), "logits become weights in place");

  struct Scratch {
    Tile tiles[kMaxTilesPerBlock];
    int tile_count;
    Scalar* logits;       // [key][lane], then weights, [unit of keys][lane] of Units
    Scalar* rescale;      // [lane]
    Scalar* highest;      // [lane]
    Unit* k_copy;         // [key][unit of d]
    Unit* v_copy;         // [unit of keys][d]
    Unit* finite_values;  // [unit of keys][d]
    int64_t bytes;
  };

  static Scratch lay_out(void* base, int64_t rows, int64_t head_dim, int64_t value_dim) {
    Arena arena{static_cast<char*>(base), 0};
    Scratch scratch{};
    arena.take(scratch.logits, int64_t{kKeysPerBlock} * kRowsPerTile);
    arena.take(scratch.rescale, kRowsPerTile);
    arena.take(scratch.highest, kRowsPerTile);
    for (int64_t row = 0; row < rows; row += kRowsPerTile) {
      const int64_t left = rows - row;
      Tile& tile = scratch.tiles[scratch.tile_count++];
      tile = {};
      tile.first_row = row;
      tile.rows = left < kRowsPerTile ? left : kRowsPerTile;
      tile.lay_out(arena, head_dim, value_dim);
    }
    arena.take(scratch.k_copy, kKeysPerBlock * units_of<Simd>(head_dim));
    arena.take(scratch.v_copy, units_of<Simd>(kKeysPerBlock) * value_dim);
    arena.take(scratch.finite_values, units_of<Simd>(kKeysPerBlock) * value_dim);
    // Last, because short sequences do without.
    for (int t = 0; t < scratch.tile_count; ++t) {
      Tile& tile = scratch.tiles[t];
      tile.lay_out_state(arena, value_dim, tile.total);
    }
    scratch.bytes = arena.used;
    return scratch;
  }

  static int64_t scratch_bytes(int64_t rows, int64_t head_dim, int64_t value_dim) {
    return lay_out(nullptr, rows, head_dim, value_dim).bytes;
  }

  // ---- one key block ----------------------------------------------------------------------

  // Where V has a NaN or an infinity, a weight of 0 would carry it into queries that mask the
  // key (0 * NaN is NaN). The value aggregation gets a copy without such elements; they are added
  // here, to the lanes that attend.
  template <int kVectors>
  static void aggregate_with_non_finite(ValueOperands<Simd> values, const KeySteps<kVectors>& units,
                                        int64_t keys, int64_t value_dim, const uint64_t* attended,
                                        Unit* finite_values, Scalar* output) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    const KeyBlock<Unit> v{values.v, values.v_stride};
    for (int64_t unit = 0; unit < units_of<Simd>(keys); ++unit) {
      for (int64_t d = 0; d < value_dim; ++d) {
        finite_values[unit * value_dim + d] = Simd::finite(v.row(unit)[d]);
      }
    }
    values.v = finite_values;
    values.v_stride = value_dim;
    value_aggregation<Simd>(values, units, value_dim, output);
    for (int64_t key = 0; key < keys; ++key) {
      const int part = static_cast<int>(key % kPerUnit);
      for (int64_t d = 0; d < value_dim; ++d) {
        const Scalar x = Simd::element(v.row(key / kPerUnit)[d], part);
        if (x - x == 0) continue;
        for (int i = 0; i < kVectors; ++i) {
          Scalar* const at = output + d * kWidth + i * Simd::kLanes;
          const Vec weight = Simd::element(
              Simd::load(values.weights + key / kPerUnit * kWidth + i * Simd::kLanes), part);
          const Vec before = Single::load(at);
          Single::store(at,
                        Single::select_bits(attended[key] >> (i * Simd::kLanes),
                                            Single::fma(Single::set(x), weight, before), before));
        }
      }
    }
  }

  // ---- the three stages, for one tile and one key block -------------------------------------

  // Keys side by side in one block, as one tile attends to them. Their number is a multiple of
  // kPerUnit, unless they are the last ones that any tile attends to.
  struct Keys : KeySpan {
    KeyBlock<Unit> k, v;
    int64_t v_distance;  // bytes from a row of k to the row of V in memory, or 0

    // `keys` is a multiple of kPerUnit.
    void skip(int64_t keys) {
      k.data += keys * k.stride;
      v.data += keys / kPerUnit * v.stride;
      first += keys;
      count -= keys;
    }
  };

  // Where V has what a weight of 0 would carry on: which lanes may see it. All that the masks leave
  // them, but for a bias of -inf.
  static void find_allowed(const Task& task, const Tile& tile, const Keys& keys, bool masked,
                           uint64_t* attended) {
    if (!masked) {
      for (int64_t key = 0; key < keys.count; ++key) attended[key] = lowest_bits(tile.rows);
    }
    if (!task.bias) return;
    with_bias_type<Element>(task, [&]<class Bias>(Bias*) {
      keep_unbiased<Bias>(attended, keys.count, bias_of(task, tile.first_row, keys),
                          task.bias_row_stride, task.bias_column_stride, tile.rows);
    });
  }

  // Leaves out the units of keys at both ends that nobody attends to: a block rarely begins and
  // ends where a mask does. Returns where the remaining keys' bits are.
  static uint64_t* trim(Keys& keys, uint64_t* attended) {
    const auto nobody = [&](int64_t begin, int64_t end) {
      uint64_t anybody = 0;
      for (int64_t key = begin; key < end; ++key) anybody |= attended[key];
      return anybody == 0;
    };
    while (keys.count > 0) {
      const int64_t last_unit = (keys.count - 1) / kPerUnit * kPerUnit;
      if (!nobody(last_unit, keys.count)) break;
      keys.count = last_unit;
    }
    while (keys.count > kPerUnit && nobody(0, kPerUnit)) {
      attended += kPerUnit;
      keys.skip(kPerUnit);
    }
    return attended;
  }

  template <int kVectors>
  static void attend(const Task& task, const Tile& tile, const Scratch& scratch, Keys keys) {
    uint64_t bits[kKeysPerBlock];
    uint64_t* attended = bits;
    const bool masked = !keys.within_limits || !keys.mask_is_full;
    if (masked) {
      find_attended(task, tile, keys, attended);
      attended = trim(keys, attended);
      if (keys.count == 0) return;
    }

    const auto steps = key_steps<kVectors, Simd::kLanes>(
        task.first_position + tile.first_row + task.window_right + 1 - keys.first, keys.count);
    // Options and masks change logits: then the highest are looked for when that is done.
    const bool final_logits = !masked && !scales_logits(task) && !task.k.scales;
    for (int lane = 0; lane < kVectors * Simd::kLanes; lane += Simd::kLanes) {
      Single::store(scratch.highest + lane, Single::load(tile.part.maximum + lane));
    }
    qk_matmul<Simd>(
        {keys.k.data, keys.k.stride, keys.v_distance, tile.queries, units_of<Simd>(task.head_dim),
         false, final_logits ? scratch.highest : nullptr},
        steps, scratch.logits);

    apply_options<Single, Element, kVectors>(task, tile, keys, scratch.logits);
    if (masked) apply_mask<Single, kVectors>(scratch.logits, keys.count, attended);
    const bool keep_apart = (masked || task.bias) &&
                            !is_finite<Simd>(keys.v, units_of<Simd>(keys.count), task.value_dim);
    if (keep_apart) find_allowed(task, tile, keys, masked, attended);
    if (!final_logits) {
      find_highest<Single, kVectors>(scratch.logits, keys.count, scratch.highest);
    }
    masked_softmax<Simd, kVectors>(
        scratch.logits, keys.count, static_cast<Scalar>(softmax_scale(task) * kLog2E),
        scratch.highest, tile.part.maximum, tile.part.sum, scratch.rescale);
    const ValueOperands<Simd> values{
        keys.v.data, keys.v.stride, reinterpret_cast<const Unit*>(scratch.logits), scratch.rescale};
    if (keep_apart) {
      aggregate_with_non_finite(values, steps.in_units_of(kPerUnit), keys.count, task.value_dim,
                                attended, scratch.finite_values, tile.part.output);
    } else {
      value_aggregation<Simd>(values, steps.in_units_of(kPerUnit), task.value_dim,
                              tile.part.output);
    }
  }

  // ---- the task -----------------------------------------------------------------------------

  static bool run(const Task& task) {
    const Scratch scratch = lay_out(task.scratch, task.queries, task.head_dim, task.value_dim);
    int64_t begin_key = INT64_MAX;
    int64_t end_key = 0;
    bool in_parts = false;
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const TileKeys& keys = task.tile_keys[t];
      if (keys.begin < keys.end) {
        begin_key = keys.begin < begin_key ? keys.begin : begin_key;
        end_key = keys.end > end_key ? keys.end : end_key;
      }
      tile.with_vectors([&](auto vectors) { tile.template begin<vectors.value>(task); });
    }

    if (begin_key < end_key) {
      const int64_t begin_block = begin_key / kKeysPerBlock;
      const int64_t last_block = (end_key - 1) / kKeysPerBlock;
      in_parts = part_of(begin_block) != part_of(last_block);
      for (int64_t block = begin_block; block <= last_block; ++block) {
        if (task.should_stop(task.stop_context)) return false;
        attend_block(task, scratch, block);
        const bool ends_part = part_of(block) != part_of(block + 1) || block == last_block;
        if (in_parts && ends_part) end_part(task, scratch, part_of(block));
      }
    }

    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const bool has_total = in_parts && task.tile_keys[t].begin < task.tile_keys[t].end;
      tile.with_vectors(
          [&](auto vectors) { tile.template finish<vectors.value>(task, has_total); });
    }
    return true;
  }

  static int64_t part_of(int64_t block) { return block / kBlocksPerPart; }

  // What a tile adds up to depends on its own first part alone, not on those of its neighbours.
  static void end_part(const Task& task, const Scratch& scratch, int64_t part) {
    for (int t = 0; t < scratch.tile_count; ++t) {
      const TileKeys& keys = task.tile_keys[t];
      const int64_t first_part = part_of(keys.begin / kKeysPerBlock);
      if (keys.begin >= keys.end || part < first_part) continue;
      const Tile& tile = scratch.tiles[t];
      tile.with_vectors(
          [&](auto vectors) { tile.template end_part<vectors.value>(task, part == first_part); });
    }
  }

  struct KeyRange {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
  };

  // Units of keys stay together, whichever tiles share a block: keys at the ends that a tile does
  // not attend to are masked.
  static KeyRange keys_in_block(const TileKeys& keys, int64_t block) {
    const int64_t begin = block * kKeysPerBlock;
    const int64_t end = begin + kKeysPerBlock;
    const int64_t first = keys.begin > begin ? keys.begin : begin;
    return {first / kPerUnit * kPerUnit, keys.end < end ? keys.end : end};
  }

  // What any tile attends to. Keys beyond may not even be there.
  static KeyRange keys_of_all_tiles(const Task& task, int tile_count, int64_t block) {
    KeyRange all{INT64_MAX, 0};
    for (int t = 0; t < tile_count; ++t) {
      if (task.tile_keys[t].begin >= task.tile_keys[t].end) continue;
      const KeyRange range = keys_in_block(task.tile_keys[t], block);
      if (range.empty()) continue;
      if (range.begin < all.begin) all.begin = range.begin;
      if (range.end > all.end) all.end = range.end;
    }
    return all;
  }

  // K and V of a block; the other members are a tile's own.
  static void load(const Task& task, const Scratch& scratch, KeyRange range, Keys& keys) {
    const int64_t count = range.end - range.begin;
    keys.k = task.k.is_int8 ? key_units<Simd, Int8>(task.k, range.begin, count, scratch.k_copy)
                            : key_units<Simd, Element>(task.k, range.begin, count, scratch.k_copy);
    keys.v = task.v.is_int8
                 ? value_units<Simd, Int8>(task.v, range.begin, count, scratch.v_copy)
                 : value_units<Simd, Element>(task.v, range.begin, count, scratch.v_copy);
    const bool both_in_place = keys.k.data != scratch.k_copy && keys.v.data != scratch.v_copy;
    keys.v_distance = both_in_place && task.k.row_stride == task.v.row_stride
                          ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(keys.v.data) -
                                                 reinterpret_cast<uintptr_t>(keys.k.data))
                          : 0;
  }

  static void attend_block(const Task& task, const Scratch& scratch, int64_t block) {
    const KeyRange all = keys_of_all_tiles(task, scratch.tile_count, block);
    Keys loaded{};
    bool is_loaded = false;
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const TileKeys& tile_keys = task.tile_keys[t];
      KeyRange range = keys_in_block(tile_keys, block);
      const BlockKind kind =
          task.mask ? task.block_kinds[t * task.block_kinds_stride + block] : BlockKind::full;
      if (tile_keys.begin >= tile_keys.end || range.empty() || kind == BlockKind::empty) continue;
      if (!is_loaded) load(task, scratch, all, loaded);
      is_loaded = true;

      const int64_t whole_units = units_of<Simd>(range.end) * kPerUnit;
      range.end = whole_units < all.end ? whole_units : all.end;
      Keys keys = loaded;
      keys.first = all.begin;
      keys.skip(range.begin - all.begin);
      keys.count = range.end - range.begin;
      keys.within_limits = tile_keys.full_begin <= range.begin && range.end <= tile_keys.full_end;
      keys.mask_is_full = kind == BlockKind::full;
      tile.with_vectors([&](auto vectors) { attend<vectors.value>(task, tile, scratch, keys); });
    }
  }
};

}  // namespace
}  // namespace numattn
