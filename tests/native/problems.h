// Random problems for the native library: arrays between protected pages, and what they should
// give, computed in double by the formula.
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
// What the error of a sum may be as a share of the sum of absolute values, with some room.
double rounding(Kind kind);

// One array (batch item, head, row, column) as numattn::Array, its values also as doubles.
struct Tensor {
  Kind kind = Kind::float32;
  int64_t batch = 1, heads = 1, rows = 1, columns = 1;
  numattn::Array array;
  GuardedMemory* memory = nullptr;
  std::vector<double> values;  // [batch item][head][row][column], as they were stored
  // Ragged: where the rows of each batch item begin; batch is 1 then. Else null.
  const int64_t* starts = nullptr;

  char* address(int64_t b, int64_t h, int64_t i, int64_t j) const;
  double stored(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return load(kind, address(b, h, i, j));
  }
  double value(int64_t b, int64_t h, int64_t i, int64_t j) const;
  void read_values();
};

// A problem, with everything it points to.
class RandomProblem {
 public:
  // `differentiable`: attention itself, without pages and 8-bit keys and values.
  explicit RandomProblem(uint64_t seed, bool differentiable = false);

  numattn::Problem problem;
  int num_threads;
  std::string description;

  // Runs it on the active level; what was in the outputs before is gone.
  numattn::Status run() const;
  // Largest error over what is allowed for the dtype; infinite where one is NaN and should not be.
  double error_share() const;
  std::vector<char> result() const;  // the bytes of out and lse

 protected:
  enum class Layout { heads_first, rows_first, packed };
  template <class Number>
  Number one_of(std::initializer_list<Number> numbers);
  bool sometimes(double probability);
  int64_t below(int64_t end);

  // Numbers of mean 0; an amplitude of 0 leaves NaN, which has to be overwritten or left unread.
  // Sometimes rows in reverse order, with gaps behind them or at odd addresses, unless packed.
  Tensor make(Kind kind, int64_t batch, int64_t heads, int64_t rows, int64_t columns, Layout layout,
              double amplitude);
  // The same for a problem's rows, where a ragged batch has one item for all of its sequences.
  Tensor make_rows(Kind kind, const int64_t* starts, int64_t heads, int64_t rows, int64_t columns,
                   Layout layout, double amplitude);
  void draw_sizes();
  void draw_options();
  void draw_ragged();
  void draw_arrays();
  // Makes batch items or heads one and the same, as broadcasting does.
  void broadcast(Tensor& tensor);
  void draw_pages(Layout layout);
  // Makes a mask by blocks of a dense one, some of whose blocks become empty or full.
  void draw_mask_blocks();
  void describe();
  int64_t queries(int64_t b) const;  // of a batch item
  int64_t keys(int64_t b) const;     // those that are valid
  // logits [key] of a query, -inf where it does not attend, before the sink.
  std::vector<double> logits(int64_t b, int64_t h, int64_t i) const;
  // What dropout multiplies a weight by.
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
