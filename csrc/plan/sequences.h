// The batch items of a problem: their lengths, their positions and their places in the arrays.
#pragma once

#include <cstdint>

#include "kernels/task.h"
#include "plan/block_kinds.h"
#include "problem.h"

namespace numattn {

// The queries and keys of one batch item.
struct Sequence {
  int64_t batch_item;
  int64_t first_query, queries;  // the valid ones
  int64_t first_key, keys;       // all keys, valid or not
  int64_t valid_keys;
  int64_t first_position;  // of the first query, among the keys
};

class Sequences {
 public:
  // The problem is kept by reference.
  explicit Sequences(const Problem& problem);

  int64_t count() const { return count_; }
  bool are_alike() const { return are_alike_; }  // whether all have the same lengths and positions
  Sequence operator[](int64_t batch_item) const;

  // The keys that any query attends to, by causal attention, window and lengths (not by the mask).
  TileKeys keys_of(const Sequence& sequence) const;

  // The view from a row of a head on; its data is null if the array's data is null.
  View moved(View view, const int64_t* batch_strides, const Sequence& sequence, int64_t head,
             int64_t row) const;
  View moved(const Array& array, const Sequence& sequence, int64_t head, int64_t row) const {
    return moved(array, array.batch_strides, sequence, head, row);
  }

  // Sets the keys of each tile of a task whose arrays are set and, unless `block_kinds` is null,
  // what the mask leaves of them.
  void set_tiles(Task& task, const Sequence& sequence, const BlockKinds* block_kinds, int64_t head,
                 int64_t first_query, int64_t queries_per_tile) const;

  // Sets the arrays and options of a task for `heads` heads from `head` on, with `queries` queries
  // of each from `first_query` on.
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
