// Attention for tiles of queries: keys come in blocks, and each block goes through the three
// stages for each tile before the next one is read. The lanes of every vector are queries, unless
// a tile has so few that its first and third stage are those of few_queries.h.
#pragma once

#include <cstdint>

#include "few_queries.h"
#include "key_steps.h"
#include "lane_masks.h"
#include "logits.h"
#include "masked_softmax.h"
#include "qk_matmul.h"
#include "table.h"
#include "tile_io.h"
#include "value_aggregation.h"

namespace numattn {
namespace {

constexpr int kKeysPerBlock = 96;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kSmallestScale = 1e-30;

// A block of K or V as the stages read it: elements side by side, `stride` elements between keys.
template <class Scalar>
struct KeyBlock {
  const Scalar* data;
  int64_t stride;
};

template <class Simd>
struct Prefill {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;
  static constexpr int kRowsPerTile = Simd::kTileVectors * Simd::kLanes;
  static_assert(kRowsPerTile <= 64, "a lane mask has 64 bits");

  // Scratch of one tile; rows are padded to whole vectors, `width` lanes.
  struct Tile {
    Scalar* queries;  // [d][lane], negated where the scale is negative
    Scalar* output;   // [d][lane], not yet divided by the sum
    Scalar* maximum;  // [lane], of the logits that the softmax sees
    Scalar* sum;      // [lane]
    int64_t first_row, rows;
    int vectors;

    // So few queries that the lanes are elements: queries and output are [row][d].
    bool few() const { return rows <= kFewQueries; }
  };

  // Hands out consecutive pieces of the scratch, or counts them where there is none.
  struct Arena {
    char* base;
    int64_t used;
    Scalar* take(int64_t elements) {
      char* const piece = base ? base + used : nullptr;
      used += (elements * static_cast<int64_t>(sizeof(Scalar)) + 63) / 64 * 64;
      return reinterpret_cast<Scalar*>(piece);
    }
  };

  struct Scratch {
    Tile tiles[kMaxTilesPerBlock];
    int tile_count;
    Scalar* logits;         // [key][lane], then weights
    Scalar* rescale;        // [lane]
    Scalar* highest;        // [lane]
    Scalar* k_copy;         // [key][d]
    Scalar* v_copy;         // [key][d]
    Scalar* finite_values;  // [key][d]
    int64_t bytes;
  };

  static Scratch lay_out(void* base, int64_t rows, int64_t head_dim, int64_t value_dim) {
    Arena arena{static_cast<char*>(base), 0};
    Scratch scratch{};
    scratch.logits = arena.take(int64_t{kKeysPerBlock} * kRowsPerTile);
    scratch.rescale = arena.take(kRowsPerTile);
    scratch.highest = arena.take(kRowsPerTile);
    for (int64_t row = 0; row < rows; row += kRowsPerTile) {
      Tile& tile = scratch.tiles[scratch.tile_count++];
      tile.first_row = row;
      tile.rows = rows - row < kRowsPerTile ? rows - row : kRowsPerTile;
      tile.vectors = static_cast<int>((tile.rows + Simd::kLanes - 1) / Simd::kLanes);
      const int64_t width = int64_t{tile.vectors} * Simd::kLanes;
      tile.queries = arena.take(head_dim * width);
      tile.output = arena.take(value_dim * width);
      tile.maximum = arena.take(width);
      tile.sum = arena.take(width);
    }
    scratch.k_copy = arena.take(kKeysPerBlock * head_dim);
    scratch.v_copy = arena.take(kKeysPerBlock * value_dim);
    scratch.finite_values = arena.take(kKeysPerBlock * value_dim);
    scratch.bytes = arena.used;
    return scratch;
  }

  static int64_t scratch_bytes(int64_t rows, int64_t head_dim, int64_t value_dim) {
    return lay_out(nullptr, rows, head_dim, value_dim).bytes;
  }

  // ---- one key block ----------------------------------------------------------------------

  static void copy_rows(const char* from, int64_t row_stride, int64_t column_stride, int64_t keys,
                        int64_t dims, Scalar* to) {
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t d = 0; d < dims; d += Simd::kLanes) {
        const int64_t count = dims - d < Simd::kLanes ? dims - d : Simd::kLanes;
        const Vec piece =
            load_elements<Simd>(from + key * row_stride + d * column_stride, column_stride, count);
        store_elements<Simd>(reinterpret_cast<char*>(to + key * dims + d), sizeof(Scalar), piece,
                             count);
      }
    }
  }

  // K and V are read where they lie, unless their elements aren't side by side and aligned.
  static KeyBlock<Scalar> key_block(const char* array, int64_t row_stride, int64_t column_stride,
                                    int64_t first_key, int64_t keys, int64_t dims, Scalar* copy) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(Scalar));
    const char* const from = array + first_key * row_stride;
    if (column_stride == kSize && row_stride % kSize == 0 &&
        reinterpret_cast<uintptr_t>(from) % alignof(Scalar) == 0) {
      return {reinterpret_cast<const Scalar*>(from), row_stride / kSize};
    }
    copy_rows(from, row_stride, column_stride, keys, dims, copy);
    return {copy, dims};
  }

  // Bytes from a row of `a` to the same row of `b`, or 0 where they are not equally far apart.
  static int64_t distance(KeyBlock<Scalar> a, KeyBlock<Scalar> b) {
    if (a.stride != b.stride) return 0;
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data) -
                                reinterpret_cast<uintptr_t>(a.data));
  }

  static bool is_finite(const Scalar* row, int64_t dims) {
    Vec nan_unless_finite = Simd::zero();
    for (int64_t d = 0; d < dims; d += Simd::kLanes) {
      const Vec x = load_up_to<Simd>(row + d, dims - d);
      nan_unless_finite = Simd::fma(x, Simd::zero(), nan_unless_finite);
    }
    return Simd::bits_not_equal(nan_unless_finite, Simd::zero()) == 0;
  }

  static bool block_is_finite(KeyBlock<Scalar> v, int64_t keys, int64_t value_dim) {
    for (int64_t key = 0; key < keys; ++key) {
      if (!is_finite(v.data + key * v.stride, value_dim)) return false;
    }
    return true;
  }

  // Where V has a NaN or an infinity, a weight of 0 would carry it into queries that mask the
  // key (0 * NaN is NaN). The value aggregation gets a copy without such elements; they are added
  // here, to the lanes that attend.
  template <int kVectors>
  static void aggregate_with_non_finite(ValueOperands<Scalar> values,
                                        const KeySteps<kVectors>& steps, int64_t keys,
                                        int64_t value_dim, const uint64_t* attended,
                                        Scalar* finite_values, Scalar* output) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    const Scalar* const v = values.v;
    const int64_t v_stride = values.v_stride;
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t d = 0; d < value_dim; ++d) {
        const Scalar x = v[key * v_stride + d];
        finite_values[key * value_dim + d] = x - x == 0 ? x : 0;
      }
    }
    values.v = finite_values;
    values.v_stride = value_dim;
    value_aggregation<Simd>(values, steps, value_dim, output);
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t d = 0; d < value_dim; ++d) {
        const Scalar x = v[key * v_stride + d];
        if (x - x == 0) continue;
        for (int i = 0; i < kVectors; ++i) {
          Scalar* const at = output + d * kWidth + i * Simd::kLanes;
          const Vec weight = Simd::load(values.weights + key * kWidth + i * Simd::kLanes);
          const Vec before = Simd::load(at);
          Simd::store(at, Simd::select_bits(attended[key] >> (i * Simd::kLanes),
                                            Simd::fma(Simd::set(x), weight, before), before));
        }
      }
    }
  }

  // The logits are scaled before the softmax where an option wants them so, or where the scale is
  // so small that its product with a logit of -inf would not be -inf. Else the softmax scales.
  static bool scales_logits(const PrefillTask& task) {
    return task.softcap > 0 || task.bias || task.alibi_slope != 0 || task.sink > -__builtin_inf() ||
           __builtin_fabs(task.scale) < kSmallestScale;
  }
  static double softmax_scale(const PrefillTask& task) {
    return scales_logits(task) ? 1.0 : __builtin_fabs(task.scale);
  }

  // ---- the three stages, for one tile and one key block -------------------------------------

  // Keys side by side in one block, as one tile attends to them.
  struct Keys {
    KeyBlock<Scalar> k, v;
    int64_t first, count;
    bool within_limits;  // every query attends to all of them, as far as limits decide
    bool mask_is_full;   // likewise, as far as the dense mask decides

    void skip(int64_t keys) {
      k.data += keys * k.stride;
      v.data += keys * v.stride;
      first += keys;
      count -= keys;
    }
  };

  // attended [key]: bit i for query lane i.
  static void find_attended(const PrefillTask& task, const Tile& tile, const Keys& keys,
                            uint64_t* attended) {
    for (int64_t key = 0; key < keys.count; ++key) attended[key] = lowest_bits(tile.rows);
    if (!keys.within_limits) {
      keep_within_window(attended, keys.first, keys.count, task.first_position + tile.first_row,
                         task.window_left, task.window_right);
    }
    if (!keys.mask_is_full) {
      keep_unmasked<kKeysPerBlock>(
          attended, keys.count,
          task.mask + tile.first_row * task.mask_row_stride + keys.first * task.mask_column_stride,
          task.mask_row_stride, task.mask_column_stride, tile.rows);
    }
  }

  static const char* bias_of(const PrefillTask& task, const Tile& tile, const Keys& keys) {
    return task.bias + tile.first_row * task.bias_row_stride + keys.first * task.bias_column_stride;
  }

  template <int kVectors>
  static void apply_options(const PrefillTask& task, const Tile& tile, const Keys& keys,
                            Scalar* logits) {
    if (scales_logits(task)) {
      apply_scale<Simd, kVectors>(logits, keys.count,
                                  static_cast<Scalar>(__builtin_fabs(task.scale)));
    }
    if (task.softcap > 0) {
      apply_softcap<Simd, kVectors>(logits, keys.count, static_cast<Scalar>(task.softcap));
    }
    if (task.bias) {
      add_bias<Simd, kVectors>(logits, keys.count, bias_of(task, tile, keys), task.bias_row_stride,
                               task.bias_column_stride, tile.rows);
    }
    if (task.alibi_slope != 0) {
      add_alibi<Simd, kVectors>(logits, keys.count, static_cast<Scalar>(task.alibi_slope),
                                task.first_position + tile.first_row - keys.first);
    }
  }

  template <int kVectors>
  static void attend(const PrefillTask& task, const Tile& tile, const Scratch& scratch, Keys keys) {
    uint64_t bits[kKeysPerBlock];
    uint64_t* attended = bits;
    const bool masked = !keys.within_limits || !keys.mask_is_full;
    if (masked) {
      find_attended(task, tile, keys, attended);
      // A block rarely begins and ends where a mask does.
      while (keys.count > 0 && attended[keys.count - 1] == 0) --keys.count;
      if (keys.count == 0) return;
      while (attended[0] == 0) {
        ++attended;
        keys.skip(1);
      }
    }

    const auto steps = key_steps<kVectors, Simd::kLanes>(
        task.first_position + tile.first_row + task.window_right + 1 - keys.first, keys.count);
    // Options and masks change logits: then the highest are looked for when that is done.
    const bool final_logits = !masked && !scales_logits(task) && !tile.few();
    for (int lane = 0; lane < kVectors * Simd::kLanes; lane += Simd::kLanes) {
      Simd::store(scratch.highest + lane, Simd::load(tile.maximum + lane));
    }
    if (tile.few()) {
      with_rows(tile, [&](auto rows) {
        qk_few_queries<Simd, rows.value>(keys.k.data, keys.k.stride, tile.queries, keys.count,
                                         task.head_dim, scratch.logits);
      });
    } else {
      qk_matmul<Simd>({keys.k.data, keys.k.stride, distance(keys.k, keys.v), tile.queries,
                       task.head_dim, false, final_logits ? scratch.highest : nullptr},
                      steps, scratch.logits);
    }

    apply_options<kVectors>(task, tile, keys, scratch.logits);
    if (masked) apply_mask<Simd, kVectors>(scratch.logits, keys.count, attended);
    const bool keep_apart = (masked || task.bias) &&
                            (tile.few() || !block_is_finite(keys.v, keys.count, task.value_dim));
    if (keep_apart) {
      if (!masked) {
        for (int64_t key = 0; key < keys.count; ++key) attended[key] = lowest_bits(tile.rows);
      }
      if (task.bias) {
        keep_unbiased<Scalar>(attended, keys.count, bias_of(task, tile, keys), task.bias_row_stride,
                              task.bias_column_stride, tile.rows);
      }
    }
    if (!final_logits) {
      find_highest<Simd, kVectors>(scratch.logits, keys.count, scratch.highest);
    }
    masked_softmax<Simd, kVectors>(scratch.logits, keys.count,
                                   static_cast<Scalar>(softmax_scale(task) * kLog2E),
                                   scratch.highest, tile.maximum, tile.sum, scratch.rescale);

    const ValueOperands<Scalar> values{keys.v.data, keys.v.stride, scratch.logits, scratch.rescale};
    if (tile.few()) {
      with_rows(tile, [&](auto rows) {
        aggregate_few_queries<Simd, rows.value>(keys.v.data, keys.v.stride, scratch.logits,
                                                keep_apart ? attended : nullptr, keys.count,
                                                task.value_dim, scratch.rescale, tile.output);
      });
    } else if (keep_apart) {
      aggregate_with_non_finite(values, steps, keys.count, task.value_dim, attended,
                                scratch.finite_values, tile.output);
    } else {
      value_aggregation<Simd>(values, steps, task.value_dim, tile.output);
    }
  }

  // ---- a tile's beginning and end ---------------------------------------------------------

  template <int kVectors>
  static void begin(const PrefillTask& task, const Tile& tile) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    if (tile.few()) {
      copy_rows(task.q + tile.first_row * task.q_row_stride, task.q_row_stride,
                task.q_column_stride, tile.rows, task.head_dim, tile.queries);
      for (int64_t i = 0; task.scale < 0 && i < tile.rows * task.head_dim; ++i) {
        tile.queries[i] = -tile.queries[i];
      }
    } else {
      pack_queries<Simd, kVectors>(task.q + tile.first_row * task.q_row_stride, task.q_row_stride,
                                   task.q_column_stride, tile.rows, task.head_dim,
                                   task.scale < 0 ? Scalar{-1} : Scalar{1}, tile.queries);
    }
    const int64_t outputs = task.value_dim * (tile.few() ? tile.rows : kWidth);
    for (int64_t i = 0; i < outputs; ++i) tile.output[i] = 0;
    // A sink is a key without a value: the running sum begins with it.
    const bool has_sink = task.sink > -__builtin_inf();
    for (int i = 0; i < kWidth; ++i) {
      tile.maximum[i] = static_cast<Scalar>(task.sink);
      tile.sum[i] = has_sink ? Scalar{1} : Scalar{0};
    }
  }

  template <int kVectors>
  static void finish(const PrefillTask& task, const Tile& tile) {
    if (task.lse) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        const auto lse = static_cast<Scalar>(tile.maximum[row] * softmax_scale(task) +
                                             __builtin_log(static_cast<double>(tile.sum[row])));
        __builtin_memcpy(task.lse + (tile.first_row + row) * task.lse_stride, &lse, sizeof(lse));
      }
    }
    Scalar factor[kVectors * Simd::kLanes];
    for (int i = 0; i < kVectors * Simd::kLanes; ++i) {
      factor[i] = tile.sum[i] == 0 ? Scalar{0} : Scalar{1} / tile.sum[i];
    }
    if (tile.few()) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        const auto row_factor = Simd::set(factor[row]);
        char* const to = task.out + (tile.first_row + row) * task.out_row_stride;
        for (int64_t d = 0; d < task.value_dim; d += Simd::kLanes) {
          const int64_t left = task.value_dim - d;
          const int64_t count = left < Simd::kLanes ? left : Simd::kLanes;
          const Vec x = load_up_to<Simd>(tile.output + row * task.value_dim + d, count);
          store_elements<Simd>(to + d * task.out_column_stride, task.out_column_stride,
                               Simd::mul(x, row_factor), count);
        }
      }
      return;
    }
    unpack_output<Simd, kVectors>(tile.output, factor, tile.rows, task.value_dim,
                                  task.out + tile.first_row * task.out_row_stride,
                                  task.out_row_stride, task.out_column_stride);
  }

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // Calls `step` with a number from 1 to kMost as a compile-time constant.
  template <int kMost, class Step>
  static void with_constant(int64_t number, Step step) {
    if constexpr (kMost > 1) {
      if (number < kMost) return with_constant<kMost - 1>(number, step);
    }
    step(Constant<kMost>{});
  }
  template <class Step>
  static void with_rows(const Tile& tile, Step step) {
    with_constant<kFewQueries>(tile.rows, step);
  }
  template <class Step>
  static void with_vectors(const Tile& tile, Step step) {
    with_constant<Simd::kTileVectors>(tile.vectors, step);
  }

  // ---- the task -----------------------------------------------------------------------------

  static bool run(const PrefillTask& task) {
    const Scratch scratch = lay_out(task.scratch, task.rows, task.head_dim, task.value_dim);
    int64_t begin_key = INT64_MAX;
    int64_t end_key = 0;
    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      const TileKeys& keys = task.tile_keys[t];
      if (keys.begin < keys.end) {
        begin_key = keys.begin < begin_key ? keys.begin : begin_key;
        end_key = keys.end > end_key ? keys.end : end_key;
      }
      with_vectors(tile, [&](auto vectors) { begin<vectors.value>(task, tile); });
    }

    const int64_t end_block = (end_key + kKeysPerBlock - 1) / kKeysPerBlock;
    for (int64_t block = begin_key / kKeysPerBlock; block < end_block; ++block) {
      if (task.should_stop(task.stop_context)) return false;
      attend_block(task, scratch, block);
    }

    for (int t = 0; t < scratch.tile_count; ++t) {
      const Tile& tile = scratch.tiles[t];
      with_vectors(tile, [&](auto vectors) { finish<vectors.value>(task, tile); });
    }
    return true;
  }

  struct KeyRange {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
  };

  static KeyRange keys_in_block(const TileKeys& keys, int64_t block) {
    const int64_t begin = block * kKeysPerBlock;
    const int64_t end = begin + kKeysPerBlock;
    return {keys.begin > begin ? keys.begin : begin, keys.end < end ? keys.end : end};
  }

  // What any tile attends to. Other keys of the block may not even be there.
  static KeyRange keys_of_all_tiles(const PrefillTask& task, int tile_count, int64_t block) {
    KeyRange all{INT64_MAX, 0};
    for (int t = 0; t < tile_count; ++t) {
      const KeyRange range = keys_in_block(task.tile_keys[t], block);
      if (range.empty()) continue;
      if (range.begin < all.begin) all.begin = range.begin;
      if (range.end > all.end) all.end = range.end;
    }
    return all;
  }

  static void attend_block(const PrefillTask& task, const Scratch& scratch, int64_t block) {
    const KeyRange all = keys_of_all_tiles(task, scratch.tile_count, block);
    Keys loaded{};
    for (int t = 0; t < scratch.tile_count; ++t) {
      const KeyRange range = keys_in_block(task.tile_keys[t], block);
      const TileKind kind =
          task.mask ? task.mask_kinds[t * task.mask_kinds_stride + block] : TileKind::full;
      if (range.empty() || kind == TileKind::empty) continue;
      if (loaded.count == 0) {
        loaded.first = all.begin;
        loaded.count = all.end - all.begin;
        loaded.k = key_block(task.k, task.k_row_stride, task.k_column_stride, loaded.first,
                             loaded.count, task.head_dim, scratch.k_copy);
        loaded.v = key_block(task.v, task.v_row_stride, task.v_column_stride, loaded.first,
                             loaded.count, task.value_dim, scratch.v_copy);
      }
      Keys keys = loaded;
      keys.skip(range.begin - loaded.first);
      keys.count = range.end - range.begin;
      keys.within_limits =
          task.tile_keys[t].full_begin <= range.begin && range.end <= task.tile_keys[t].full_end;
      keys.mask_is_full = kind == TileKind::full;
      const Tile& tile = scratch.tiles[t];
      with_vectors(tile, [&](auto vectors) { attend<vectors.value>(task, tile, scratch, keys); });
    }
  }
};

}  // namespace
}  // namespace numattn
