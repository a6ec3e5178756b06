// What every ISA level exports: a table of functions, and the task they take.
//
// A kernel allocates nothing, schedules nothing and keeps no state. Strides are in bytes; arrays
// may have any alignment and any strides, also 0 for what is broadcast; outputs overlap nothing.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace numattn {

// What a dense mask leaves of a query tile in a key block.
enum class TileKind : uint8_t { empty, full, mixed };

// The keys of a query tile: some query attends within [begin, end), every query attends to all
// of [full_begin, full_end), as far as limits (causal, window, lengths) decide.
struct TileKeys {
  int64_t begin, end;
  int64_t full_begin, full_end;
};

constexpr int kMaxTilesPerBlock = 16;

// Up to kMaxTilesPerBlock tiles of consecutive queries of one head, against that head's keys.
struct PrefillTask {
  int64_t rows;  // queries
  int64_t head_dim, value_dim;

  // Each points at the task's first row; k, v, mask and bias at key 0.
  const char* q;  // [row][d]
  int64_t q_row_stride, q_column_stride;
  const char* k;  // [key][d]
  int64_t k_row_stride, k_column_stride;
  const char* v;  // [key][d]
  int64_t v_row_stride, v_column_stride;
  char* out;  // [row][d]
  int64_t out_row_stride, out_column_stride;
  char* lse;  // [row], or null
  int64_t lse_stride;

  const char* mask;  // [row][key] bytes, 0 is masked; or null
  int64_t mask_row_stride, mask_column_stride;
  const TileKind* mask_kinds;  // [tile][key block], where mask is not null
  int64_t mask_kinds_stride;   // elements from tile to tile
  const char* bias;            // [row][key], natural logarithms; or null
  bool bias_is_float32;        // whatever q holds; else of what q holds
  int64_t bias_row_stride, bias_column_stride;

  int64_t first_position;             // of the first row, among the keys
  int64_t window_left, window_right;  // inclusive; causal is a right side of 0
  TileKeys tile_keys[kMaxTilesPerBlock];

  double scale;
  double softcap;      // 0 for none
  double alibi_slope;  // 0 for none
  double sink;         // natural logarithm, -inf for none

  void* scratch;  // DtypeKernels::prefill_scratch_bytes, aligned to 64 bytes

  // Asked once per key block. True abandons the task: `out` and `lse` are then undefined.
  bool (*should_stop)(void* context);
  void* stop_context;
};

// The kernels for one dtype.
struct DtypeKernels {
  int rows_per_tile;        // queries in a tile
  int keys_per_block;       // keys in a key block; blocks start at its multiples
  int max_tiles_per_block;  // worth sharing a key block; at most kMaxTilesPerBlock

  int64_t (*prefill_scratch_bytes)(int64_t rows, int64_t head_dim, int64_t value_dim);
  // False if it was stopped.
  bool (*prefill)(const PrefillTask& task);

  // For benchmarks: multiply-adds as fast as this level can; returns the flops done.
  double (*multiply_adds)(int64_t rounds);
};

struct KernelTable {
  const char* isa;
  DtypeKernels dtypes[kDtypes];

  // For tests: y[i] = 2^x[i], by the exp2 of the kernels.
  void (*exp2_float32)(const float* x, float* y, int64_t count);
  void (*exp2_float64)(const double* x, double* y, int64_t count);

  const DtypeKernels& of(Dtype dtype) const { return dtypes[static_cast<int>(dtype)]; }
};

}  // namespace numattn
