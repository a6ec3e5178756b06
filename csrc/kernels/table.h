// What every ISA level exports: a table of functions, and the task they take.
//
// A kernel allocates nothing, schedules nothing and keeps no state. Strides are in bytes; arrays
// may have any alignment and any strides, also 0 for what is broadcast; outputs overlap nothing.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// What a dense mask leaves of a query tile in a key block.
enum class BlockKind : uint8_t { empty, full, mixed };

// The keys of a query tile: some query attends within [begin, end), every query attends to all
// of [full_begin, full_end), as far as limits (causal, window, lengths) decide.
struct TileKeys {
  int64_t begin, end;
  int64_t full_begin, full_end;
};

constexpr int kMaxTilesPerBlock = 16;

// The rows of K or V for one head: [key][d]. With pages, key j is row j % page_size of page
// pages[j / page_size].
struct KeyRows {
  const char* data;  // of key 0, or of page 0
  int64_t row_stride, column_stride;
  int64_t dims;
  const int64_t* pages;  // or null
  int64_t page_size, page_stride;
  // Rows of int8, each to be multiplied by a float of its own: strided and paged like the rows.
  bool is_int8;
  const char* scales;
  int64_t scale_row_stride, scale_page_stride;
  // To the same row of the next head of K or V.
  int64_t head_stride, scale_head_stride;
};

// Consecutive queries of one head, or of all heads that share a head of K and V, against keys. For
// decode there may be several heads of K and V: everything below is then that of the first of them.
struct Task {
  int64_t kv_heads;  // 1, or for decode heads whose rows of K and V stand side by side
  int64_t heads;     // 1 for prefill; for decode those that share a head of K and V
  int64_t queries;   // of each head
  int64_t head_dim, value_dim;

  // Each points at the first query of the first head; mask and bias at key 0.
  const char* q;  // [head][query][d]
  int64_t q_head_stride, q_row_stride, q_column_stride;
  KeyRows k, v;
  char* out;  // [head][query][d]
  int64_t out_head_stride, out_row_stride, out_column_stride;
  char* lse;  // [head][query], or null
  int64_t lse_head_stride, lse_row_stride;

  const char* mask;  // [head][query][key] bytes, 0 is masked; or null
  int64_t mask_head_stride, mask_row_stride, mask_column_stride;
  const BlockKind* block_kinds;  // [tile][key block], for prefill where mask is not null
  int64_t block_kinds_stride;    // elements from tile to tile
  const char* bias;              // [head][query][key], natural logarithms; or null
  bool bias_is_float32;          // whatever q holds; else of what q holds
  int64_t bias_head_stride, bias_row_stride, bias_column_stride;

  int64_t first_position;                 // of the first query, among the keys
  int64_t window_left, window_right;      // inclusive; causal is a right side of 0
  TileKeys tile_keys[kMaxTilesPerBlock];  // of each tile; for decode the first, of all queries

  double scale;
  double softcap;              // 0 for none
  const double* alibi_slopes;  // [head], or null
  const double* sinks;         // [head], natural logarithms, -inf for none; or null

  // For stages by themselves: out is [query][key] of scalars, where keys are columns, or [key] for
  // Stage::received, where keys are rows.
  Stage stage;
  int64_t keys_begin, keys_end;  // the keys of this task, valid or not
  int64_t valid_keys;
  void* maximum;  // [query] scalars, in the terms of the softmax: written by Stage::statistics
  void* sum;

  void* state;                // for decode: DtypeKernels::decode_state_bytes, aligned to 64 bytes
  int64_t state_head_stride;  // bytes from head to head of K and V
  void* scratch;              // of the kernel's scratch_bytes, aligned to 64 bytes

  // Asked once per key block. True abandons the task: `out` and `lse` are then undefined.
  bool (*should_stop)(void* context);
  void* stop_context;
};

// Rows of one head whose pairs of elements are to be rotated; out may be x. cos and sin are scalars
// [row][pair], pairs side by side.
struct RowRotation {
  const char* x;
  int64_t x_row_stride, x_column_stride;
  char* out;
  int64_t out_row_stride, out_column_stride;
  const char *cos, *sin;
  int64_t angle_stride;  // bytes from row to row
  int64_t rows, dim, rotary_dim;
  bool interleaved;
};

// The kernels for one dtype.
struct DtypeKernels {
  int rows_per_tile;        // queries in a tile
  int keys_per_block;       // keys in a key block; blocks start at its multiples
  int max_tiles_per_block;  // worth sharing a key block; at most kMaxTilesPerBlock

  // Up to max_tiles_per_block tiles of queries of one head, with all their keys.
  int64_t (*prefill_scratch_bytes)(int64_t rows, int64_t head_dim, int64_t value_dim);
  bool (*prefill)(const Task& task);  // false if it was stopped

  // Few queries, up to so many rows for each head of K and V, with a chunk of their keys: what lies
  // in tile_keys[0], into the states, one for each head of K and V. Chunks start at multiples of
  // keys_per_chunk. Then decode_finish merges the states of the chunks, which begin at task.state
  // and stand state_stride bytes apart (aligned to 64), into out and lse.
  int max_decode_rows;
  int keys_per_chunk;
  int64_t (*decode_scratch_bytes)(int64_t kv_heads, int64_t rows, int64_t head_dim,
                                  int64_t value_dim);
  int64_t (*decode_state_bytes)(int64_t rows, int64_t value_dim);
  bool (*decode)(const Task& task);  // false if it was stopped
  void (*decode_finish)(const Task& task, int64_t chunks, int64_t state_stride);

  // Stages by themselves: some queries of one head with all keys, or, for Stage::received, all
  // queries with at most keys_per_chunk keys.
  int64_t (*stage_scratch_bytes)(int64_t head_dim);
  bool (*run_stage)(const Task& task);  // false if it was stopped

  // Rows by themselves, in C order: mask is null for none; out may be scores.
  void (*softmax_rows)(const void* scores, const uint8_t* mask, void* out, int64_t rows,
                       int64_t columns);
  void (*rotate_rows)(const RowRotation& rows);

  // For benchmarks: multiply-adds as fast as this level can; returns the flops done.
  double (*multiply_adds)(int64_t rounds);
};

struct KernelTable {
  const char* isa;
  DtypeKernels dtypes[kDtypes];

  // For tests: y[i] = 2^x[i], by the exp2 of the kernels.
  void (*exp2_float32)(const float* x, float* y, int64_t count);
  void (*exp2_float64)(const double* x, double* y, int64_t count);
  // For benchmarks: the sum of `count` floats, a multiple of 64, read as fast as memory gives them.
  float (*read_floats)(const float* from, int64_t count);

  const DtypeKernels& of(Dtype dtype) const { return dtypes[static_cast<int>(dtype)]; }
};

}  // namespace numattn
