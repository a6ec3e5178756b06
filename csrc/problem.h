// The contract of the native library: one struct says what to compute, one call does it.
//
// Shapes:
//   q           (batch..., query_heads, query_length, head_dim)
//   k           (batch..., kv_heads, key_length, head_dim)
//   v           (batch..., kv_heads, key_length, value_dim)
//   out         (batch..., query_heads, query_length, value_dim)
//   lse         (batch..., query_heads, query_length)
//   mask, bias  (batch..., query_heads, query_length, key_length)
//   tail mask   (batch..., query_heads, query_length, tail_mask_keys)
//
// Layout. All arrays have the same batch axes. Strides are in bytes and may have either sign. An
// input has a stride of 0 along each axis on which it is broadcast. Elements may be unaligned,
// except those of typed arrays such as kv_lengths.
// - Ragged batches: the sequences follow one another along the rows of q and out, and also along
//   the rows of k and v.
// - Pages: k and v are (pages, kv_heads, page_size, ...). Key j of a batch item is row
//   j % page_size of page block_table[batch item][j / page_size].
//
// The caller allocates every array, including the outputs, and neither writes nor frees one before
// the call returns. The elements of an output do not overlap each other or an input.
//
// Keys and values that no query attends to never affect a result, so they may be uninitialised.
// Those beyond kv_lengths are not read. The caller has checked the arguments; nothing here checks
// them again.
#pragma once

#include <cstdint>

namespace numattn {

// The element type of q, k, v and out. 16-bit floats are computed in float32, except that CPUs with
// bfloat16 products use them.
enum class Dtype { float32, float64, float16, bfloat16 };
constexpr int kDtypes = 4;

constexpr int bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Which part of attention a call computes.
enum class Stage : uint8_t {
  attention,
  logits,      // after all options except sinks and dropout; masked ones are -inf
  statistics,  // each query's largest logit and the sum of its weights, for `received`
  weights,     // the factors that the values are multiplied by
  received,    // for each key, the sum of its weights over the queries
};

// NumPy allows 64 axes. Two of them are rows and columns.
inline constexpr int kMaxBatchAxes = 62;

// A side of a window that excludes nothing.
inline constexpr int64_t kUnbounded = int64_t{1} << 62;

// The heads of an array, indexed by (head, row, column). Strides are in bytes.
struct View {
  char* data = nullptr;
  int64_t head_stride = 0;
  int64_t row_stride = 0;     // rows are queries in q, out, lse, mask and bias; keys in k and v
  int64_t column_stride = 0;  // columns are elements of a vector; keys in mask, bias and logits
};

struct Array : View {
  int64_t page_stride = 0;               // only of k, v and their scales, if in pages
  int64_t batch_strides[kMaxBatchAxes];  // the first Problem::batch_axes are set
};

// A mask made of blocks of queries and keys. Each block is empty, full, or has a bit for each pair
// of a query and a key. All blocks have the same size, except that the last one along each axis may
// be smaller.
struct MaskBlocks {
  // The number of a block, an aligned int32, is one of these two or the index of a block in `bits`.
  static constexpr int32_t kEmpty = -2, kFull = -1;

  int64_t queries = 0, keys = 0;  // of a block; 0: the mask is not made of blocks
  int64_t row_stride = 0;         // bytes from one row of blocks to the next; columns have no gaps
  const uint8_t* bits = nullptr;  // [block][query][key / 8], bit key % 8; 0 is masked
};

// The steps from products of q and k to weights, in the order in which they are applied. Window and
// mask decide which keys a query attends to, sinks add to the softmax's denominator, and dropout
// acts on the weights.
struct Options {
  double scale = 1.0;
  double softcap = 0.0;                  // softcap * tanh(logit / softcap); 0 for none
  View bias;                             // added; -inf masks a key; data null: none
  bool bias_is_float32 = false;          // for any dtype; otherwise the bias has dtype
  const double* alibi_slopes = nullptr;  // [query head], or null
  // A query at position p attends to keys p - window_left ... p + window_right. Causal attention
  // has a window_right of 0.
  int64_t window_left = kUnbounded;
  int64_t window_right = kUnbounded;
  // Bytes; 0 masks a key; data null: none. With `mask_blocks` it points to the blocks' numbers, and
  // its row_stride and column_stride are 0.
  View mask;
  MaskBlocks mask_blocks;
  // If not -1, the mask's columns are the last tail_mask_keys valid keys, and all keys before them
  // are visible. If -1, its columns are all keys.
  int64_t tail_mask_keys = -1;
  const double* sinks = nullptr;  // [query head], natural logarithms, -inf for none; or null
  // The share of weights to drop, in [0, 1). The others are multiplied by 1 / (1 - dropout). The
  // seed decides which weights are dropped (kernels/options/dropout.h).
  double dropout = 0.0;
  uint64_t dropout_seed = 0;
};

struct Problem {
  int batch_axes = 0;
  int64_t batch_shape[kMaxBatchAxes];     // the first batch_axes are set
  int64_t query_heads = 1, kv_heads = 1;  // query head h reads KV head h / (query_heads / kv_heads)
  int64_t query_length = 0, key_length = 0;
  int64_t head_dim = 1, value_dim = 1;  // 1 to 2^40, so that scratch sizes do not overflow

  // Stages other than attention have no v and no lse, and support neither ragged batches nor pages.
  // Their out is float64 if dtype is float64, else float32. Its shape is (batch..., query_heads,
  // query_length, key_length), or (batch..., query_heads, key_length) for Stage::received, whose
  // rows are keys. Stage::statistics has no out.
  Stage stage = Stage::attention;
  // (batch..., query_heads, query_length) in C order, aligned, of the dtype of Stage::received's
  // out. Stage::statistics writes them, and Stage::received reads them.
  char* maximum = nullptr;
  char* sum = nullptr;

  Dtype dtype = Dtype::float32;
  Array q, k, v, out;           // of dtype
  bool out_is_float32 = false;  // only with a 16-bit dtype: out is float32, not rounded to dtype
  Array lse;                    // float64 if dtype is float64, else float32; data null: not wanted

  Options options;
  int64_t mask_batch_strides[kMaxBatchAxes], bias_batch_strides[kMaxBatchAxes];

  // Whether k, v are 8-bit integers instead of dtype. Each row is multiplied by its scale, a
  // float32. Scales are indexed like k and v, without columns.
  bool k_is_int8 = false, v_is_int8 = false;
  Array k_scales, v_scales;  // data null unless k, v are 8-bit integers

  // Ragged batches: [batch item + 1], the first row of each sequence, then the end of the last one.
  // The batch has one axis, along which all strides are 0. Null: every item has query_length
  // queries and key_length keys.
  const int64_t* query_starts = nullptr;
  const int64_t* key_starts = nullptr;
  // Pages: [batch item][pages_per_item], the numbers of the pages. Null: k and v are not in pages.
  const int64_t* block_table = nullptr;
  int64_t pages_per_item = 0, page_size = 0;

  // For each batch item in row-major order: the position of its first query among the keys, the
  // number of valid keys, and the number of valid queries. Without q_offset, the last valid query
  // is at the position of the last valid key. Without lengths, all keys and queries are valid.
  // Queries that are not valid get zeros as results, but -inf as lse and logits.
  const int64_t* q_offset = nullptr;
  const int64_t* kv_lengths = nullptr;
  const int64_t* q_lengths = nullptr;
};

enum class Status { done, out_of_memory, interrupted };

struct Execution {
  int num_threads = 1;
  // The calling thread calls it about ten times a second. True abandons the computation: then out
  // and lse are undefined.
  bool (*interrupted)() = nullptr;
};

Status attention(const Problem& problem, const Execution& execution);

}  // namespace numattn
