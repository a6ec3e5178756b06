// The task that a kernel takes: some queries of one KV head, or of adjacent KV heads, and some
// keys.
//
// Strides are in bytes. Arrays may have any alignment and any strides, including 0 for broadcast
// axes; outputs overlap nothing. Whoever plans the task owns all memory that it points to.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// What a mask leaves of a query tile in a key block.
enum class BlockKind : uint8_t { empty, full, mixed };

// The keys of a query tile, as limited by causal, window and lengths: no query attends outside
// [begin, end), and every query attends to all of [full_begin, full_end).
struct TileKeys {
  int64_t begin, end;
  int64_t full_begin, full_end;
};

// For `queries` queries, the first at `first_position`, and keys [begin, end).
static inline TileKeys tile_keys(const Options& options, int64_t first_position, int64_t queries,
                                 int64_t begin, int64_t end) {
  const int64_t last_position = first_position + queries - 1;
  const auto clip = [&](int64_t key) { return key > end ? end : key < begin ? begin : key; };
  return {clip(first_position - options.window_left),
          clip(last_position + options.window_right + 1), clip(last_position - options.window_left),
          clip(first_position + options.window_right + 1)};
}

// Whether the last queries attend to the most keys. If so, they come first: in the order of work
// items and, for gradients, whose sums depend on the order, in the order of tiles.
static inline bool last_queries_come_first(const Options& options) {
  return options.window_right != kUnbounded;
}

// Options of the heads from `head` on. Masks and biases also depend on the row: the caller moves
// them.
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
  // Whether rows are int8. Each row is then multiplied by its own scale, a float; scales are
  // strided and paged like the rows.
  bool is_int8;
  View scales;
  const int64_t* pages;  // or null
  int64_t page_size, page_stride, scale_page_stride;
};

// Consecutive queries of one head, or of all heads that share a KV head, against keys. For decode
// and small heads there may be several KV heads: all pointers are then for the first one.
struct Task {
  int64_t kv_heads;  // for decode, with adjacent rows in memory; 1 for prefill
  int64_t heads;     // 1 for prefill; otherwise the query heads that share a KV head
  int64_t queries;   // of each head
  int64_t head_dim, value_dim;

  // These begin at the first query of the first head.
  View q;  // [head][query][d]
  KeyRows k, v;
  View out;             // [head][query][d]
  bool out_is_float32;  // otherwise the type of q
  View lse;             // [head][query]; data null: not requested
  // Mask and bias are [head][query][key]: the bias begins at key 0, the mask at mask_begin. Slopes
  // and sinks are [head].
  Options options;
  int64_t mask_begin;  // the mask hides no key before it; may be negative

  int64_t weight_exponent;  // softmax/overflow.h; 0 unless sums have overflowed
  int64_t first_position;   // of the first query, in the sequence of keys
  // Indices of the first query for dropout, which counts queries from the start of a sequence.
  int64_t batch_item, first_head, first_row;
  const BlockKind* block_kinds;           // [tile][key block], for prefill with a mask
  int64_t block_kinds_stride;             // elements from tile to tile
  TileKeys tile_keys[kMaxTilesPerBlock];  // of each tile; for decode one for all queries

  // For single stages: out holds scalars, [query][key] with keys as columns, or [key] for
  // Stage::received, with keys as rows.
  Stage stage;
  int64_t keys_begin, keys_end;  // the keys of this task, valid or not
  int64_t valid_keys;            // also for small heads
  void* maximum;  // [query] scalars, before softmax_scale: written by Stage::statistics
  void* sum;

  void* state;                // for decode: DtypeKernels::decode_state_bytes, aligned to 64 bytes
  int64_t state_head_stride;  // bytes from KV head to KV head
  void* scratch;              // of the kernel's scratch_bytes, aligned to 64 bytes

  // Asked once per key block. True abandons the task: `out` and `lse` are then undefined.
  bool (*should_stop)(void* context);
  void* stop_context;
};

// Whether the mask lets every query attend to all keys before `end`.
static inline bool mask_is_full(const Task& task, int64_t end) {
  return !task.options.mask.data || end <= task.mask_begin;
}

// What the dense mask leaves of tile `tile` in key block `block`, for keys before `end`.
static inline BlockKind block_kind(const Task& task, int tile, int64_t block, int64_t end) {
  if (mask_is_full(task, end)) return BlockKind::full;
  return task.block_kinds ? task.block_kinds[tile * task.block_kinds_stride + block]
                          : BlockKind::mixed;
}

// The backward pass of a prefill task: its queries, and what they add to the gradients of some
// keys. `out` and `lse` are inputs here.
struct GradientTask : Task {
  bool dout_is_float32;  // otherwise the type of q
  View dout;             // [query][d]
  View dlse;             // [query]; data null: zeros
  View dq;               // [query][d], contiguous scalars
  View dk, dv;           // [key][d], contiguous scalars, from key 0 on
  View dbias;            // [query][key], scalars, from key 0 on; or data null
  // dK and dV are summed in parts of several tiles each, because the rounding error of one long sum
  // grows with the number of tiles. data null: there are few tiles.
  View dk_part, dv_part;   // shaped like dk and dv
  int64_t* part_of_block;  // [key block]: the part whose sums dk_part and dv_part hold
  int64_t first_tile;      // index among all tiles that add to dk and dv, in their order
};

// How the rows of a product are rotated, head by head: rotary embedding. cos and sin are scalars
// [row][pair] without gaps between pairs. They repeat if the product has more rows.
struct HeadRotation {
  const char *cos, *sin;  // null: no rotation
  int64_t rows;
  int64_t row_stride;
  int64_t head_dim, rotary_dim;
  bool interleaved;
};

// The most rows and columns of a work item of a product. With few rows, the weight is read in
// place.
struct ProjectionLimits {
  int64_t rows, columns;
  bool are_few_rows;
};

// out [row][column] = x [row][step] * weight [step][column] + bias [column]. x, weight and out may
// have any strides; the bias is contiguous, or null for none. With a rotation, columns are whole
// heads.
struct ProjectionTask {
  View x, weight, out;  // head_stride is not used
  const char* bias;
  HeadRotation rotation;
  int64_t rows, depth, columns;
  int64_t first_row;    // index of this task's first row in the product
  bool out_is_float32;  // otherwise the type of x
  bool (*should_stop)(void* context);
  void* stop_context;
  void* scratch;  // aligned to 64 bytes
};

// Rows of one head whose pairs of elements are rotated; out may be x. cos and sin are scalars
// [row][pair], without gaps between pairs.
struct RowRotation {
  View x, out;  // head_stride is not used
  const char *cos, *sin;
  int64_t angle_stride;  // bytes from row to row
  int64_t rows, dim, rotary_dim;
  bool interleaved;
};

}  // namespace numattn
