// The batch items of a problem: their lengths and positions, and where their arrays are.
#pragma once

#include <cstdint>

#include "kernels/task.h"
#include "plan/block_kinds.h"
#include "problem.h"

namespace numattn {

// What one batch item computes.
struct Sequence {
  int64_t batch_item;
  int64_t first_query, queries;  // the valid ones
  int64_t first_key, keys;       // the keys that there are, valid or not
  int64_t valid_keys;
  int64_t first_position;  // of the first query, among the keys
};

class Sequences {
 public:
  // The problem is kept by reference.
  explicit Sequences(const Problem& problem);

  int64_t count() const { return count_; }
  bool are_alike() const { return are_alike_; }  // all have the lengths and positions of the first
  Sequence operator[](int64_t batch_item) const;

  // The keys that any query attends to, as far as limits decide.
  TileKeys keys_of(const Sequence& sequence) const;

  // Where a row of a head of an array is; null if the array is.
  View moved(View view, const int64_t* batch_strides, const Sequence& sequence, int64_t head,
             int64_t row) const;
  View moved(const Array& array, const Sequence& sequence, int64_t head, int64_t row) const {
    return moved(array, array.batch_strides, sequence, head, row);
  }

  // The tiles of a task with its arrays: their keys, and what a dense mask leaves of these, if
  // there is one.
  void set_tiles(Task& task, const Sequence& sequence, const BlockKinds* block_kinds, int64_t head,
                 int64_t first_query, int64_t queries_per_tile) const;

  // A task for `queries` queries from `first_query` on of `heads` heads from `head` on.
  void set_arrays(Task& task, const Sequence& sequence, int64_t head, int64_t heads,
                  int64_t first_query, int64_t queries) const;

 private:
  KeyRows key_rows(const Array& rows, const Array& scales, bool is_int8, int64_t dims,
                   const Sequence& sequence, int64_t kv_head) const;

  const Problem& problem_;
  int64_t count_;
  bool are_alike_;
};

}  // namespace numattn
