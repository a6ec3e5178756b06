// Attention for tiles of queries. The lanes of every vector are queries: of one head, or a few of
// each head that shares K and V (decode_tiles.h). Keys come in blocks. Each block goes through
// QK^T, options and masks, softmax and value aggregation for every tile before the next block is
// read.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_block.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/dropout.h"
#include "kernels/options/lane_masks.h"
#include "kernels/products/key_steps.h"
#include "kernels/products/qk_matmul.h"
#include "kernels/products/value_aggregation.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"
#include "kernels/tile.h"

namespace numattn {
namespace {

// An Element is what the arrays q, k, v and out hold.
template <class Arithmetic, class Element>
struct Prefill {
  using Vectors = typename Arithmetic::Vectors;
  using Scalar = typename Vectors::Scalar;
  using QkUnits = typename Arithmetic::QkUnits;
  using ValueUnits = typename Arithmetic::ValueUnits;
  using QkUnit = typename QkUnits::Unit;
  using ValueUnit = typename ValueUnits::Unit;
  using Tile = numattn::Tile<Arithmetic, Element>;
  static constexpr int kPerUnit = ValueUnits::kElements;  // keys
  static constexpr int kQueriesPerTile = Tile::kMaxQueries;
  static_assert(kKeysPerBlock % kPerUnit == 0, "units of keys do not depend on blocks");

  struct Scratch {
    Tile tiles[kMaxTilesPerBlock];
    int tile_count;
    Scalar* logits;            // [key][lane], then weights [unit of keys][lane]
    Scalar* rescale;           // [lane]
    Scalar* highest;           // [lane]
    QkUnit* k_copy;            // [key][unit of d]
    ValueUnit* v_copy;         // [unit of keys][d]
    ValueUnit* finite_values;  // [unit of keys][d]
    Element* q_copy;           // [row][d], for tiles of several heads
    int64_t bytes;
  };

  // How many heads fit into a tile with all of their queries.
  static int64_t heads_per_tile(int64_t queries) {
    return queries < kQueriesPerTile ? kQueriesPerTile / queries : 1;
  }

  static Scratch lay_out(void* base, int64_t heads, int64_t queries, int64_t head_dim,
                         int64_t value_dim) {
    Arena arena{static_cast<char*>(base), 0};
    Scratch scratch{};
    arena.take(scratch.logits, int64_t{kKeysPerBlock} * kQueriesPerTile);
    arena.take(scratch.rescale, kQueriesPerTile);
    arena.take(scratch.highest, kQueriesPerTile);
    const int64_t per_tile = heads_per_tile(queries);
    for (int64_t head = 0; head < heads; head += per_tile) {
      for (int64_t first = 0; first < queries; first += kQueriesPerTile) {
        const int64_t left = queries - first;
        Tile& tile = scratch.tiles[scratch.tile_count++];
        tile = {};
        tile.rows = {first, left < kQueriesPerTile ? left : kQueriesPerTile,
                     heads - head < per_tile ? heads - head : per_tile, head};
        tile.lay_out(arena, head_dim, value_dim);
      }
    }
    arena.take(scratch.k_copy, kKeysPerBlock * units_of<QkUnits>(head_dim));
    arena.take(scratch.v_copy, units_of<ValueUnits>(kKeysPerBlock) * value_dim);
    arena.take(scratch.finite_values, units_of<ValueUnits>(kKeysPerBlock) * value_dim);
    arena.take(scratch.q_copy, heads == 1 ? 0 : kQueriesPerTile * head_dim);
    // Last, because short sequences never touch them.
    for (int t = 0; t < scratch.tile_count; ++t) {
      Tile& tile = scratch.tiles[t];
      tile.lay_out_state(arena, value_dim, tile.total);
    }
    scratch.bytes = arena.used;
    return scratch;
  }

  static int64_t scratch_bytes(int64_t queries, int64_t head_dim, int64_t value_dim) {
    return lay_out(nullptr, 1, queries, head_dim, value_dim).bytes;
  }

  // ---- one tile, one key block ----------------------------------------------------------------

  // The keys of a block that one tile attends to. Their number is a multiple of kPerUnit, except at
  // the end of the keys that any tile attends to.
  struct Keys : KeySpan {
    KeyBlock<QkUnit> k;
    KeyBlock<ValueUnit> v;
    int64_t v_distance;  // bytes from a row of K to its row of V in memory, or 0

    // `keys` is a multiple of kPerUnit.
    void skip(int64_t keys) {
      k.data += keys * k.stride;
      v.data += keys / kPerUnit * v.stride;
      first += keys;
      count -= keys;
    }
  };

  // If V has a NaN or an infinity, even a weight of 0 would carry it into queries that mask the key
  // (0 * NaN is NaN). So the value aggregation gets a copy without such elements, and they are
  // added here, only to the lanes that attend.
  template <int kVectors>
  static void aggregate_with_non_finite(ValueOperands<ValueUnits> values,
                                        const KeySteps<kVectors>& units, int64_t keys,
                                        int64_t value_dim, const uint64_t* attended,
                                        ValueUnit* finite_values, Scalar* output) {
    constexpr int kWidth = kVectors * Vectors::kLanes;
    const KeyBlock<ValueUnit> v{values.v, values.v_stride};
    for (int64_t unit = 0; unit < units_of<ValueUnits>(keys); ++unit) {
      for (int64_t d = 0; d < value_dim; ++d) {
        finite_values[unit * value_dim + d] = ValueUnits::finite(v.row(unit)[d]);
      }
    }
    values.v = finite_values;
    values.v_stride = value_dim;
    value_aggregation<ValueUnits>(values, units, value_dim, output);
    for (int64_t key = 0; key < keys; ++key) {
      const int element = static_cast<int>(key % kPerUnit);
      for (int64_t d = 0; d < value_dim; ++d) {
        const Scalar x = ValueUnits::element(v.row(key / kPerUnit)[d], element);
        if (x - x == 0) continue;
        for (int lane = 0; lane < kWidth; lane += Vectors::kLanes) {
          Scalar* const at = output + d * kWidth + lane;
          const auto weight = ValueUnits::element(
              ValueUnits::load(values.weights + key / kPerUnit * kWidth + lane), element);
          const auto before = Vectors::load(at);
          const auto after = Vectors::fma(Vectors::set(x), weight, before);
          Vectors::store(at, Vectors::select_bits(attended[key] >> lane, after, before));
        }
      }
    }
  }

  // Drops the units of keys at both ends that no query attends to: a block rarely begins and ends
  // where a mask does. Returns the bits of the remaining keys.
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

  // In a mask made of blocks, full blocks may end within a block of keys.
  static bool all_attend(const uint64_t* attended, int64_t keys, int64_t rows) {
    const uint64_t all = lowest_bits(rows);
    uint64_t missing = 0;
    for (int64_t key = 0; key < keys; ++key) missing |= attended[key] ^ all;
    return missing == 0;
  }

  template <int kVectors>
  static void attend(const Task& task, const Tile& tile, const Scratch& scratch, Keys keys) {
    using Map = TileMap<Vectors, kVectors>;
    uint64_t bits[kKeysPerBlock];
    uint64_t* attended = bits;  // [key]
    bool masked = !keys.within_limits || !keys.mask_is_full;
    if (masked) {
      find_attended<kKeysPerBlock>(task, tile.rows, keys, attended);
      attended = trim(keys, attended);
      if (keys.count == 0) return;
      masked = !all_attend(attended, keys.count, tile.rows.count());
    }

    const int64_t limit_of_first_query =
        task.first_position + tile.rows.first_query + task.options.window_right + 1;
    const auto steps = tile.rows.heads > 1 ? all_steps<kVectors>(keys.count)
                                           : key_steps<kVectors, Vectors::kLanes>(
                                                 limit_of_first_query - keys.first, keys.count);
    // If options or masks change the logits, the highest ones are found afterwards.
    const bool final_logits = !masked && has_plain_logits(task);
    for (int lane = 0; lane < Map::kLanes; lane += Vectors::kLanes) {
      Vectors::store(scratch.highest + lane, Vectors::load(tile.chunk.maximum + lane));
    }
    qk_matmul<QkUnits>({keys.k.data, keys.k.stride, keys.v_distance, tile.queries,
                        units_of<QkUnits>(task.head_dim), final_logits ? scratch.highest : nullptr},
                       steps, scratch.logits);

    apply_options<Element>(task, Map{tile.rows}, keys, scratch.logits);
    if (masked) apply_mask<Map>(attended, keys.count, scratch.logits);
    if (!final_logits) {
      find_highest<Vectors, kVectors>(scratch.logits, keys.count, scratch.highest);
    }
    if (task.options.dropout > 0) {
      uint64_t kept[kKeysPerBlock];
      find_kept(task, tile.rows, keys, kept);
      add_block<ValueUnits, kVectors, true>(scratch.logits, keys.count, softmax_scale(task),
                                            task.weight_exponent, scratch.highest, tile.chunk,
                                            scratch.rescale, kept);
    } else {
      add_block<ValueUnits, kVectors>(scratch.logits, keys.count, softmax_scale(task),
                                      task.weight_exponent, scratch.highest, tile.chunk,
                                      scratch.rescale);
    }

    const ValueOperands<ValueUnits> values{keys.v.data, keys.v.stride,
                                           reinterpret_cast<const ValueUnit*>(scratch.logits),
                                           scratch.rescale};
    const auto steps_of_units = steps.in_units_of(kPerUnit);
    if ((!masked && !task.options.bias.data) ||
        is_finite<ValueUnits>(keys.v, units_of<ValueUnits>(keys.count), task.value_dim)) {
      value_aggregation<ValueUnits>(values, steps_of_units, task.value_dim, tile.chunk.output);
      return;
    }
    for (int64_t key = 0; !masked && key < keys.count; ++key) {
      attended[key] = lowest_bits(tile.rows.count());
    }
    if (task.options.bias.data) keep_unbiased<Element>(task.options, tile.rows, keys, attended);
    aggregate_with_non_finite(values, steps_of_units, keys.count, task.value_dim, attended,
                              scratch.finite_values, tile.chunk.output);
  }

  // ---- all tiles, one key block ---------------------------------------------------------------

  struct KeyRange {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
  };

  // Units of keys are never split, whichever tiles share a block: keys at the ends that a tile does
  // not attend to are masked.
  static KeyRange keys_in_block(const TileKeys& keys, int64_t block) {
    const int64_t begin = block * kKeysPerBlock;
    const int64_t end = begin + kKeysPerBlock;
    const int64_t first = keys.begin > begin ? keys.begin : begin;
    return {first / kPerUnit * kPerUnit, keys.end < end ? keys.end : end};
  }

  // The keys that any tile attends to. Keys outside may not exist in memory.
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

  // Whether the rows of V are the first elements of K's rows.
  static bool is_part_of_k(const Task& task) {
    const KeyRows &k = task.k, &v = task.v;
    return v.rows.data == k.rows.data && v.rows.row_stride == k.rows.row_stride &&
           v.rows.column_stride == k.rows.column_stride && v.page_stride == k.page_stride &&
           v.dims <= k.dims && !k.is_int8 && !v.is_int8;
  }

  // K and V of a block; the other members are a tile's own.
  static void load(const Task& task, const Scratch& scratch, KeyRange range, Keys& keys) {
    const int64_t count = range.end - range.begin;
    keys.k = k_block<QkUnits, Element>(task.k, range.begin, count, scratch.k_copy);
    keys.v_distance = 0;
    if constexpr (QkUnits::kElements == 1 && ValueUnits::kElements == 1) {
      if (is_part_of_k(task)) {
        keys.v = keys.k;
        return;
      }
    }
    keys.v = v_block<ValueUnits, Element>(task.v, range.begin, count, scratch.v_copy);
    const bool both_in_place = keys.k.data != scratch.k_copy && keys.v.data != scratch.v_copy;
    if (both_in_place && task.k.rows.row_stride == task.v.rows.row_stride) {
      keys.v_distance = static_cast<int64_t>(reinterpret_cast<uintptr_t>(keys.v.data) -
                                             reinterpret_cast<uintptr_t>(keys.k.data));
    }
  }

  static void attend_block(const Task& task, const Scratch& scratch, int64_t block) {
    const KeyRange all = keys_of_all_tiles(task, scratch.tile_count, block);
    Keys loaded{};
    bool is_loaded = false;
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const TileKeys& tile_keys = task.tile_keys[t];
      KeyRange range = keys_in_block(tile_keys, block);
      const BlockKind kind = block_kind(task, t, block, range.end);
      if (tile_keys.begin >= tile_keys.end || range.empty() || kind == BlockKind::empty) continue;
      if (!is_loaded) load(task, scratch, all, loaded);
      is_loaded = true;

      const int64_t whole_units = units_of<ValueUnits>(range.end) * kPerUnit;
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

  // ---- the task -------------------------------------------------------------------------------

  static int64_t chunk_of(int64_t block) { return block / kBlocksPerChunk; }

  // A tile's total begins with its own first chunk, whatever the first chunk of its neighbours is.
  static void end_chunk(const Task& task, const Scratch& scratch, int64_t chunk) {
    for (int t = 0; t < scratch.tile_count; ++t) {
      const TileKeys& keys = task.tile_keys[t];
      const int64_t first_chunk = chunk_of(keys.begin / kKeysPerBlock);
      const int64_t last_chunk = chunk_of((keys.end - 1) / kKeysPerBlock);
      if (keys.begin >= keys.end || chunk < first_chunk || chunk > last_chunk) continue;
      const Tile& tile = scratch.tiles[t];
      tile.with_vectors([&](auto vectors) {
        tile.template end_chunk<vectors.value>(task, chunk == first_chunk);
      });
    }
  }

  // The same task for one of its tiles.
  static Task task_of_tile(const Task& task, const Tile& tile, int t) {
    Task alone = task;
    const QueryRows& rows = tile.rows;
    Options& options = alone.options = options_from_head(task.options, rows.first_head);
    View* const views[] = {&alone.q, &alone.out, &alone.lse, &options.mask, &options.bias};
    for (View* const view : views) {
      if (!view->data) continue;
      view->data += rows.first_head * view->head_stride + rows.first_query * view->row_stride;
    }
    alone.heads = rows.heads;
    alone.queries = rows.queries;
    alone.first_position += rows.first_query;
    alone.first_row += rows.first_query;
    alone.tile_keys[0] = task.tile_keys[t];
    if (task.block_kinds) alone.block_kinds += t * task.block_kinds_stride;
    return alone;
  }

  static void begin(const Task& task, const Scratch& scratch, double sink) {
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      tile.with_vectors(
          [&](auto vectors) { tile.template begin<vectors.value>(task, sink, scratch.q_copy); });
    }
  }

  static bool run(const Task& task) {
    const Scratch scratch = lay_out(task.scratch, 1, task.queries, task.head_dim, task.value_dim);
    begin(task, scratch, sink_of(task, 0));
    int64_t begin_key = INT64_MAX;
    int64_t end_key = 0;
    bool in_chunks = false;
    for (int t = 0; t < scratch.tile_count; ++t) {
      const TileKeys& keys = task.tile_keys[t];
      if (keys.begin < keys.end) {
        begin_key = keys.begin < begin_key ? keys.begin : begin_key;
        end_key = keys.end > end_key ? keys.end : end_key;
      }
    }

    if (begin_key < end_key) {
      const int64_t begin_block = begin_key / kKeysPerBlock;
      const int64_t last_block = (end_key - 1) / kKeysPerBlock;
      in_chunks = chunk_of(begin_block) != chunk_of(last_block);
      for (int64_t block = begin_block; block <= last_block; ++block) {
        if (task.should_stop(task.stop_context)) return false;
        attend_block(task, scratch, block);
        const bool ends_chunk = chunk_of(block) != chunk_of(block + 1) || block == last_block;
        if (in_chunks && ends_chunk) end_chunk(task, scratch, chunk_of(block));
      }
    }

    bool is_done[kMaxTilesPerBlock];
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const bool has_total = in_chunks && task.tile_keys[t].begin < task.tile_keys[t].end;
      tile.with_vectors(
          [&](auto vectors) { is_done[t] = tile.template finish<vectors.value>(task, has_total); });
    }
    for (int t = 0; t < scratch.tile_count; ++t) {
      if (is_done[t]) continue;
      Task again = task_of_tile(task, scratch.tiles[t], t);
      again.weight_exponent = exponent_for(again.tile_keys[0].end - again.tile_keys[0].begin);
      if (!run(again)) return false;
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
