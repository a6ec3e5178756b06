// Random problems for the native library. The arrays are between protected pages, and the expected
// results are computed in double by the formula.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "guarded_memory.h"
#include "problem.h"

enum class Kind { float32, float64, float16, bfloat16, int8, byte };

size_t size_of(Kind kind);  // in bytes
numattn::Dtype dtype_of(Kind kind);
void store(Kind kind, char* to, double x);
double load(Kind kind, const char* from);
// The error that a sum may have, as a share of the sum of absolute values, with some room.
double rounding(Kind kind);

// One array (batch item, head, row, column) as a numattn::Array, and its values as doubles.
struct Tensor {
  Kind kind = Kind::float32;
  int64_t batch = 1, heads = 1, rows = 1, columns = 1;
  numattn::Array array;
  GuardedMemory* memory = nullptr;
  std::vector<double> values;  // [batch item][head][row][column], rounded as stored
  // Ragged batches: the first row of each sequence; batch is then 1. Otherwise null.
  const int64_t* starts = nullptr;

  char* address(int64_t b, int64_t h, int64_t i, int64_t j) const;
  double stored(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return load(kind, address(b, h, i, j));
  }
  double value(int64_t b, int64_t h, int64_t i, int64_t j) const;
  void read_values();
};

// A problem and everything that it points to.
class RandomProblem {
 public:
  // `differentiable`: only Stage::attention, without pages and without 8-bit keys and values.
  explicit RandomProblem(uint64_t seed, bool differentiable = false);

  numattn::Problem problem;
  int num_threads;
  std::string description;

  // Overwrites the outputs with NaN, then runs the problem on the active level.
  numattn::Status run() const;
  // The largest error, divided by the error allowed for the dtype; infinite if there is an
  // unexpected NaN.
  double error_share() const;
  std::vector<char> result() const;  // the bytes of out and lse

 protected:
  enum class Layout { heads_first, rows_first, packed };
  template <class Number>
  Number one_of(std::initializer_list<Number> numbers);
  bool sometimes(double probability);
  int64_t below(int64_t end);

  // Makes an array of random numbers with a mean of 0. An amplitude of 0 leaves NaN, which the
  // kernels must overwrite or not read. Unless the layout is packed, rows are sometimes in reverse
  // order, followed by gaps or at odd addresses.
  Tensor make(Kind kind, int64_t batch, int64_t heads, int64_t rows, int64_t columns, Layout layout,
              double amplitude);
  // The same for the rows of a problem. A ragged batch has one item with all of its sequences.
  Tensor make_rows(Kind kind, const int64_t* starts, int64_t heads, int64_t rows, int64_t columns,
                   Layout layout, double amplitude);
  void draw_sizes();
  void draw_options();
  void draw_ragged();
  void draw_arrays();
  // Sometimes gives batch items or heads a stride of 0, as broadcasting does.
  void broadcast(Tensor& tensor);
  void draw_pages(Layout layout);
  // Turns a dense mask into a mask by blocks. Some of its blocks become empty or full.
  void draw_mask_blocks();
  void describe();
  int64_t queries(int64_t b) const;  // of a batch item
  int64_t keys(int64_t b) const;     // those that are valid
  // The logits [key] of a query without the sink; -inf for keys that it does not attend to.
  std::vector<double> logits(int64_t b, int64_t h, int64_t i) const;
  // The factor that dropout multiplies a weight by.
  double dropout_factor(int64_t b, int64_t h, int64_t i, int64_t j) const;
  void forget_outputs() const;

  std::mt19937_64 random_;
  bool differentiable_;
  std::vector<std::unique_ptr<GuardedMemory>> memory_;
  Kind kind_, k_kind_, v_kind_, precision_;
  int64_t batch_, group_, page_size_ = 0;
  Tensor q_, k_, v_, k_scales_, v_scales_, mask_, bias_, out_, lse_, maximum_, sum_;
  std::vector<int64_t> q_offset_, kv_lengths_, q_lengths_, block_table_, query_starts_, key_starts_;
  std::vector<double> slopes_, sinks_;
};
