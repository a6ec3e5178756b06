// What every ISA level exports: a table of kernels for each dtype.
//
// A kernel allocates nothing, schedules nothing and keeps no state.
#pragma once

#include <cstdint>

#include "kernels/task.h"
#include "problem.h"
#include "row_operations.h"

namespace numattn {

// The kernels for one dtype.
struct DtypeKernels {
  int queries_per_tile;     // queries in a tile
  int keys_per_block;       // keys in a key block; blocks start at its multiples
  int max_tiles_per_block;  // as many as profit from sharing a key block; at most kMaxTilesPerBlock

  // Prefill: up to max_tiles_per_block tiles of queries of one head, with all their keys.
  int64_t (*prefill_scratch_bytes)(int64_t rows, int64_t head_dim, int64_t value_dim);
  bool (*prefill)(const Task& task);  // false if it was stopped

  // Few queries, with a chunk of their keys. Chunks start at multiples of keys_per_chunk.
  // - `decode`: up to max_decode_rows rows for each KV head. The keys of tile_keys[0] go into the
  //   states, one state for each KV head.
  // - `decode_tiles`: more rows, up to max_decode_queries queries of each head. As many heads as
  //   fit share a tile. Some heads of one KV head, or all heads of several KV heads, fill up to
  //   kMaxTilesPerBlock tiles. The keys of tile_keys, which are the same for all tiles, go into the
  //   states.
  // Then decode_finish merges the states of the chunks into out and lse. The states begin at
  // task.state and are state_stride bytes apart (aligned to 64).
  int max_decode_rows, max_decode_queries;
  int keys_per_chunk;
  int64_t (*decode_scratch_bytes)(const Task& task);
  bool (*decode)(const Task& task);  // false if it was stopped
  int64_t (*decode_tiles_scratch_bytes)(const Task& task);
  bool (*decode_tiles)(const Task& task);  // false if it was stopped
  int64_t (*decode_state_bytes)(int64_t rows, int64_t value_dim);
  void (*decode_finish)(const Task& task, int64_t chunks, int64_t state_stride);

  // Small heads: at most this many queries and keys, no int8, and an `out` of the inputs' dtype.
  // Takes all heads of some KV heads, with all valid keys.
  int max_small_queries, max_small_keys;
  int64_t (*small_scratch_bytes)(int64_t head_dim, int64_t value_dim);
  bool (*attend_small)(const Task& task);  // false if it was stopped

  // Gradients: up to max_backward_queries(dims) queries of one head, in tiles of
  // queries_per_backward_tile. First call backward_begin, then backward_keys with the same scratch
  // for the keys that the queries attend to, a multiple of keys_per_backward_chunk at a time.
  // tile_keys and block_kinds describe these tiles.
  int queries_per_backward_tile, keys_per_backward_chunk;
  int64_t (*max_backward_queries)(int64_t head_dim, int64_t value_dim);
  int64_t (*backward_scratch_bytes)(const GradientTask& task);
  void (*backward_begin)(const GradientTask& task);
  bool (*backward_keys)(const GradientTask& task, int64_t begin, int64_t end);  // false: stopped
  // After the last task of a KV head, for all of its valid keys: adds the last parts to dk and dv.
  void (*backward_end)(const GradientTask& task, int64_t begin, int64_t end);
  int tiles_per_backward_part;

  // Single stages: some queries of one head with all keys, or, for Stage::received, all queries
  // with at most keys_per_chunk keys.
  int64_t (*stage_scratch_bytes)(int64_t head_dim);
  bool (*run_stage)(const Task& task);  // false if it was stopped

  // Products with a matrix, one work item at a time.
  ProjectionLimits (*projection_limits)(int64_t rows, int64_t weight_column_stride);
  int64_t (*projection_scratch_bytes)(const ProjectionTask& task);
  bool (*project)(const ProjectionTask& task);  // false if it was stopped

  // Single rows, in C order. A null mask means none; out may be scores.
  void (*softmax_rows)(const void* scores, const uint8_t* mask, void* out, int64_t rows,
                       int64_t columns);
  void (*rotate_rows)(const RowRotation& rows);

  // Some elements, or some rows, of a problem of row_operations.h.
  void (*activate)(const Activation& elements);
  void (*activate_back)(const ActivationGradient& elements);
  void (*normalize_rows)(const Normalization& rows);
  void (*normalize_rows_back)(const NormalizationGradient& rows);
};

struct KernelTable {
  // A level that changes only some dtypes leaves the kernels of the others null: the dispatch fills
  // them in from the previous level.
  DtypeKernels dtypes[kDtypes];

  const DtypeKernels& of(Dtype dtype) const { return dtypes[static_cast<int>(dtype)]; }
};

}  // namespace numattn
