// What the options make of the logits of a tile of queries and a block of keys, and which of them
// count.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/options/lane_masks.h"
#include "kernels/options/logits.h"
#include "kernels/table.h"

namespace numattn {
namespace {

// Keys side by side in one block, as one tile attends to them.
struct KeySpan {
  int64_t first, count;
  bool within_limits;  // every query attends to all of them, as far as limits decide
  bool mask_is_full;   // likewise, as far as the dense mask decides
};

// attended [key]: bit i for query lane i. A Tile has first_row and rows.
template <class Tile>
void find_attended(const Task& task, const Tile& tile, const KeySpan& keys, uint64_t* attended) {
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

inline const char* bias_of(const Task& task, int64_t first_row, const KeySpan& keys) {
  return task.bias + first_row * task.bias_row_stride + keys.first * task.bias_column_stride;
}

// logits [key][lane], in place. The scale is applied where scales_logits says so.
template <class Simd, class Element, int kVectors, class Tile>
void apply_options(const Task& task, const Tile& tile, const KeySpan& keys,
                   typename Simd::Scalar* logits) {
  using Scalar = typename Simd::Scalar;
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
      add_bias<Simd, Bias, kVectors>(logits, keys.count, bias_of(task, tile.first_row, keys),
                                     task.bias_row_stride, task.bias_column_stride, tile.rows);
    });
  }
  if (has_alibi(task)) {
    constexpr int kWidth = kVectors * Simd::kLanes;
    Scalar slopes[kWidth], distances[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      slopes[lane] = static_cast<Scalar>(*task.alibi_slopes);
      distances[lane] =
          static_cast<Scalar>(task.first_position + tile.first_row + lane - keys.first);
    }
    add_alibi<Simd, kVectors>(logits, keys.count, 1, slopes, distances);
  }
}

}  // namespace
}  // namespace numattn
