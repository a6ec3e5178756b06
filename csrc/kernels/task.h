// The task that a kernel takes: some queries of one KV head, or of adjacent ones, with some keys.
//
// Strides are in bytes; arrays may have any alignment and any strides, also 0 for what is
// broadcast; outputs overlap nothing. Whoever plans the task owns all memory that it points at.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// What a mask leaves of a query tile in a key block.
enum class BlockKind : uint8_t { empty, full, mixed };

// The keys of a query tile: some query attends within [begin, end), every query attends to all
// of [full_begin, full_end), as far as limits (causal, window, lengths) decide.
struct TileKeys {
  int64_t begin, end;
  int64_t full_begin, full_end;
};

// For `queries` queries, the first of them at `first_position`, and keys [begin, end).
static inline TileKeys tile_keys(const Options& options, int64_t first_position, int64_t queries,
                                 int64_t begin, int64_t end) {
  const int64_t last_position = first_position + queries - 1;
  const auto clip = [&](int64_t key) { return key > end ? end : key < begin ? begin : key; };
  return {clip(first_position - options.window_left),
          clip(last_position + options.window_right + 1), clip(last_position - options.window_left),
          clip(first_position + options.window_right + 1)};
}

// Whether the queries with the most keys are the last ones. They come first then: in work items
// and, for gradients, which add up in that order, in their tiles.
static inline bool last_queries_come_first(const Options& options) {
  return options.window_right != kUnbounded;
}

// Options of the heads from `head` on. Masks and biases are moved by whoever knows the row, too.
static inline Options options_from_head(Options options, int64_t head) {
  if (options.alibi_slopes) options.alibi_slopes += head;
  if (options.sinks) options.sinks += head;
  return options;
}

constexpr int kMaxTilesPerBlock = 16;

// K or V of one head: [key][d]. In pages, key j is row j % page_size of page pages[j / page_size].
struct KeyRows {
  View rows;  // from key 0, or page 0, on
  int64_t dims;
  // Rows of int8, each to be multiplied by a float of its own: strided and paged like the rows.
  bool is_int8;
  View scales;
  const int64_t* pages;  // or null
  int64_t page_size, page_stride, scale_page_stride;
};

// Consecutive queries of one head, or of all heads that share a KV head, against keys. For decode
// and small heads there may be several KV heads: all pointers are then for the first of them.
struct Task {
  int64_t kv_heads;  // for decode those whose rows are adjacent in memory; 1 for prefill
  int64_t heads;     // 1 for prefill; else the query heads that share a KV head
  int64_t queries;   // of each head
  int64_t head_dim, value_dim;

  // From the first query of the first head on.
  View q;  // [head][query][d]
  KeyRows k, v;
  View out;             // [head][query][d]
  bool out_is_float32;  // or else as q
  View lse;             // [head][query]; data null: not wanted
  // Mask and bias [head][query][key], the bias from key 0 on, the mask from mask_begin on; slopes
  // and sinks [head].
  Options options;
  int64_t mask_begin;  // keys before it are visible, as far as the mask decides; may be negative

  int64_t weight_exponent;  // softmax/overflow.h; 0 unless sums have overflowed
  int64_t first_position;   // of the first query, among the keys
  // Of the first query, as dropout counts: queries from the first of a sequence on.
  int64_t batch_item, first_head, first_row;
  const BlockKind* block_kinds;           // [tile][key block], for prefill with a mask
  int64_t block_kinds_stride;             // elements from tile to tile
  TileKeys tile_keys[kMaxTilesPerBlock];  // of each tile; for decode the first, of all queries

  // For stages by themselves: out is [query][key] of scalars, where keys are columns, or [key] for
  // Stage::received, where keys are rows.
  Stage stage;
  int64_t keys_begin, keys_end;  // the keys of this task, valid or not
  int64_t valid_keys;            // of small heads, too
  void* maximum;  // [query] scalars, before softmax_scale: written by Stage::statistics
  void* sum;

  void* state;                // for decode: DtypeKernels::decode_state_bytes, aligned to 64 bytes
  int64_t state_head_stride;  // bytes from KV head to KV head
  void* scratch;              // of the kernel's scratch_bytes, aligned to 64 bytes

  // Asked once per key block. True abandons the task: `out` and `lse` are then undefined.
  bool (*should_stop)(void* context);
  void* stop_context;
};

// Whether the mask leaves all keys before `end` to every query.
static inline bool mask_is_full(const Task& task, int64_t end) {
  return !task.options.mask.data || end <= task.mask_begin;
}

// What the dense mask leaves of the task's tile `tile` in key block `block`, of keys before `end`.
static inline BlockKind block_kind(const Task& task, int tile, int64_t block, int64_t end) {
  if (mask_is_full(task, end)) return BlockKind::full;
  return task.block_kinds ? task.block_kinds[tile * task.block_kinds_stride + block]
                          : BlockKind::mixed;
}

// Prefill's task backwards: its queries, and what they add to the gradients of some keys. `out` and
// `lse` are read.
struct GradientTask : Task {
  bool dout_is_float32;  // or else as q
  View dout;             // [query][d]
  View dlse;             // [query]; data null: zeros
  View dq;               // [query][d] of scalars without gaps
  View dk, dv;           // [key][d] of scalars without gaps, from key 0 on
  View dbias;            // [query][key] of scalars, from key 0 on; or data null
  // What dK and dV get is summed in parts, each of some tiles by itself: the rounding errors of one
  // long sum grow with the number of all tiles. data null: they are few.
  View dk_part, dv_part;   // as dk and dv
  int64_t* part_of_block;  // [key block], whose sums dk_part and dv_part hold
  int64_t first_tile;      // its number among all tiles that add to dk and dv, in their order
};

// How the rows of a product are rotated, each head by itself: rotary embedding. cos and sin are
// scalars [row][pair] without gaps between pairs; the product has more rows where they repeat.
struct HeadRotation {
  const char *cos, *sin;  // null: no rotation
  int64_t rows;
  int64_t row_stride;
  int64_t head_dim, rotary_dim;
  bool interleaved;
};

// What a work item of a product is to have at most. The weight of few rows is read where it is.
struct ProjectionLimits {
  int64_t rows, columns;
  bool are_few_rows;
};

// out [row][column] = x [row][step] * weight [step][column] + bias [column], of elements of any
// strides but the bias, which has no gaps; bias null: none. With a rotation, columns are whole
// heads.
struct ProjectionTask {
  View x, weight, out;  // head_stride is not used
  const char* bias;
  HeadRotation rotation;
  int64_t rows, depth, columns;
  int64_t first_row;    // of these, in the product
  bool out_is_float32;  // or else as x
  bool (*should_stop)(void* context);
  void* stop_context;
  void* scratch;  // aligned to 64 bytes
};

// Rows of one head whose pairs of elements are to be rotated; out may be x. cos and sin are scalars
// [row][pair], without gaps between pairs.
struct RowRotation {
  View x, out;  // head_stride is not used
  const char *cos, *sin;
  int64_t angle_stride;  // bytes from row to row
  int64_t rows, dim, rotary_dim;
  bool interleaved;
};

}  // namespace numattn
