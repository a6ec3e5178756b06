// The contract of the native library: one struct says what to compute, one call does it.
//
// Shapes. q (batch..., query_heads, query_length, head_dim), k (batch..., kv_heads, key_length,
// head_dim), v (batch..., kv_heads, key_length, value_dim), out (batch..., query_heads,
// query_length, value_dim), lse out's shape without its last axis; mask and bias
// (batch..., query_heads, query_length, key_length), a tail mask (..., tail_mask_keys). All have
// the same batch axes: what is broadcast has a stride of 0. Strides are in bytes, of any sign, and
// 0 where an input is broadcast. Elements may be unaligned. Ragged batches: the rows of q and out
// hold one sequence after another, and so do the rows of k and v. Pages: k and v are (pages,
// kv_heads, page_size, ...), and key j of a batch item is row j % page_size of page
// block_table[batch item][j / page_size]. The caller allocates every array, outputs included, and
// leaves them alone until the call is over. Outputs overlap neither themselves nor an input. Keys
// and values that no query attends to never get into a result (they may be uninitialised), and
// those beyond kv_lengths are not read. The caller has checked the arguments: nothing here is
// checked again.
#pragma once

#include <cstdint>

namespace numattn {

// What q, k, v and out hold. 16-bit floats are computed in float32, except for products of bfloat16
// where a CPU has them.
enum class Dtype { float32, float64, float16, bfloat16 };
constexpr int kDtypes = 4;

constexpr int bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What of attention a call computes.
enum class Stage : uint8_t {
  attention,
  logits,      // after all options but the sinks; masked ones are -inf
  statistics,  // each query's largest logit and the sum of its weights, for `received`
  weights,     // what the values are multiplied by
  received,    // for each key its weights, added up over the queries
};

// NumPy allows 64 axes; two are rows and columns.
inline constexpr int kMaxBatchAxes = 62;

// A side of a window that excludes nothing.
inline constexpr int64_t kUnbounded = int64_t{1} << 62;

// The heads of an array: element (head, row, column), strides in bytes.
struct View {
  char* data = nullptr;
  int64_t head_stride = 0;
  int64_t row_stride = 0;     // queries of q, out, lse, mask, bias; keys of k and v
  int64_t column_stride = 0;  // elements of a vector; keys of mask and bias; else unused
};

struct Array : View {
  int64_t page_stride = 0;               // of k, v and their scales in pages
  int64_t batch_strides[kMaxBatchAxes];  // the first Problem::batch_axes are set
};

// A mask by blocks of queries and keys: what a block says of its pairs. All blocks are as large but
// the last ones of each axis, whose size is what is left.
struct MaskBlocks {
  // Numbers of the blocks, int32: one of the two below, or the block of `bits` that it is.
  static constexpr int32_t kEmpty = -2, kFull = -1;

  int64_t queries = 0, keys = 0;  // of a block; 0: the mask is no mask by blocks
  int64_t row_stride = 0;         // bytes from a row of blocks to the next; columns have no gaps
  const uint8_t* bits = nullptr;  // [block][query][key / 8], bit key % 8; 0 is masked
};

// From products of q and k to logits, in the order in which it happens. The last three decide who
// attends to whom, and what else is in the denominator.
struct Options {
  double scale = 1.0;
  double softcap = 0.0;                  // softcap * tanh(logit / softcap); 0 for none
  View bias;                             // added; -inf masks; data null: none
  bool bias_is_float32 = false;          // whatever dtype is; else of dtype
  const double* alibi_slopes = nullptr;  // [query head], or null
  // A query at position p attends to keys p - window_left ... p + window_right. Causal is a right
  // side of 0.
  int64_t window_left = kUnbounded;
  int64_t window_right = kUnbounded;
  // Bytes, 0 is masked; data null: none. With `mask_blocks`, numbers of blocks: then row_stride and
  // column_stride are 0.
  View mask;
  MaskBlocks mask_blocks;
  // The mask's columns are the last so many valid keys, and all keys before them are visible; -1:
  // its columns are all keys.
  int64_t tail_mask_keys = -1;
  const double* sinks = nullptr;  // [query head], natural logarithms, -inf for none; or null
  // The share of weights that is dropped, in [0, 1); the others grow by 1 / (1 - dropout). Which
  // ones the seed decides (kernels/options/dropout.h).
  double dropout = 0.0;
  uint64_t dropout_seed = 0;
};

struct Problem {
  int batch_axes = 0;
  int64_t batch_shape[kMaxBatchAxes];     // the first batch_axes are set
  int64_t query_heads = 1, kv_heads = 1;  // query head h reads KV head h / (query_heads / kv_heads)
  int64_t query_length = 0, key_length = 0;
  int64_t head_dim = 1, value_dim = 1;  // 1 to 2^40, so that sizes of scratch do not overflow

  // Another stage than attention has neither v nor lse, sequences nor pages. Its out is
  // (batch..., query_heads, query_length, key_length), or (batch..., query_heads, key_length) for
  // Stage::received, of float64 where that is dtype, else float32; Stage::statistics has none.
  Stage stage = Stage::attention;
  // (batch..., query_heads, query_length) in C order, of out's dtype: written by Stage::statistics,
  // read by Stage::received.
  char* maximum = nullptr;
  char* sum = nullptr;

  Dtype dtype = Dtype::float32;
  Array q, k, v, out;           // of dtype
  bool out_is_float32 = false;  // beside 16 bits: not rounded
  Array lse;                    // float64 where that is dtype, else float32; data null: not wanted

  Options options;
  int64_t mask_batch_strides[kMaxBatchAxes], bias_batch_strides[kMaxBatchAxes];

  // 8-bit integers in place of dtype, each row to be multiplied by its scale: float32, without
  // columns.
  bool k_is_int8 = false, v_is_int8 = false;
  Array k_scales, v_scales;  // data null unless k, v are 8-bit integers

  // Ragged: [batch item + 1], where the rows of each sequence begin; the batch has one axis and
  // strides of 0. Null: every item has query_length queries and key_length keys.
  const int64_t* query_starts = nullptr;
  const int64_t* key_starts = nullptr;
  // In pages: [batch item][pages_per_item] numbers of pages. Null: not in pages.
  const int64_t* block_table = nullptr;
  int64_t pages_per_item = 0, page_size = 0;

  // For each batch item in row-major order: the position of the first query among the keys, how
  // many keys are valid, and how many queries. Null: positions end with the valid queries and keys;
  // all are valid. Queries from there on get zeros, and -inf as lse and logits.
  const int64_t* q_offset = nullptr;
  const int64_t* kv_lengths = nullptr;
  const int64_t* q_lengths = nullptr;
};

enum class Status { done, out_of_memory, interrupted };

struct Execution {
  int num_threads = 1;
  // Called by the calling thread about ten times a second; true abandons the computation, which
  // leaves out and lse undefined.
  bool (*interrupted)() = nullptr;
};

Status attention(const Problem& problem, const Execution& execution);

}  // namespace numattn
