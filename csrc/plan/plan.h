// A problem becomes work items. Where a sequence has many queries, an item is a block of
// consecutive queries of one head with all the keys that they attend to (prefill). Where it has
// few, an item is all queries of the heads that share a head of K and V, with a chunk of the keys
// (decode); the chunks' states are merged by whoever computes the last one. Where the rows of
// several heads of K and V stand side by side, they go into one item, so that memory is read from
// beginning to end. Stages by themselves take a tile of queries of one head with all keys, or all
// queries with a chunk of the keys.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "problem.h"

namespace numattn {

struct Item {
  Task
      task;  // all but the state, the scratch and the stop function, which the executing thread has
  bool is_decode;
  // For decode: the chunks of a head of K and V, and the number of this one's state (of the item's
  // first head) among all states, in which the states of a head's chunks stand side by side and the
  // heads behind each other. One chunk has no state there.
  int64_t chunks, chunk, state;
};

class Plan {
 public:
  // Throws std::bad_alloc. `block_kinds` is null where the problem has no mask or no prefill. All
  // are kept by reference.
  Plan(const Problem& problem, const DtypeKernels& kernels, const BlockKinds* block_kinds,
       int num_threads);

  // Whether a sequence of so many queries is computed by decoding: a matter of its shape alone.
  static bool is_decoded(const Problem& problem, const DtypeKernels& kernels, int64_t queries);

  int64_t items() const { return items_; }
  int64_t states() const { return states_; }
  int64_t max_decode_rows() const { return max_decode_rows_; }  // of any decode item
  // No more than num_threads, and fewer where the work is not worth waking a thread for.
  int threads() const { return threads_; }

  // Prefill items of one head stand together, so that its keys stay in the cache, the longest of
  // them first.
  Item item(int64_t number) const;

 private:
  // What one batch item computes.
  struct Sequence {
    int64_t batch_item;
    int64_t first_query, queries;
    int64_t first_key, keys;  // the keys that there are, valid or not
  };
  struct Counts {
    int64_t items, states;
  };

  int64_t group() const { return problem_.query_heads / problem_.kv_heads; }
  int64_t neighbouring_kv_heads() const;
  Sequence sequence(int64_t batch_item) const;
  Counts counts(const Sequence& sequence) const;
  int64_t chunks(const Sequence& sequence) const;
  double cost(const Sequence& sequence) const;
  char* address(const Array& array, const Sequence& sequence, int64_t head, int64_t row) const;
  KeyRows key_rows(const Array& array, const Array& scales, bool is_int8, int64_t dims,
                   const Sequence& sequence, int64_t kv_head) const;
  TileKeys tile_keys(int64_t first_position, int64_t rows, int64_t valid_keys) const;
  void set_prefill(Item& item, const Sequence& sequence, int64_t local) const;
  void set_decode(Item& item, const Sequence& sequence, int64_t local) const;
  void set_stage(Item& item, const Sequence& sequence, int64_t local) const;
  // The arrays of `queries` queries from `first_query` on of `heads` heads from `head` on.
  void set_arrays(Task& task, const Sequence& sequence, int64_t head, int64_t heads,
                  int64_t first_query, int64_t queries) const;
  int64_t valid_keys(const Sequence& sequence) const;

  const Problem& problem_;
  const DtypeKernels& kernels_;
  const BlockKinds* block_kinds_;
  int64_t batch_items_;
  int64_t rows_per_item_;      // of prefill
  int64_t kv_heads_per_item_;  // of decode
  int64_t items_, states_;
  int64_t max_decode_rows_ = 0;
  int threads_;
  // Ragged: [batch item + 1], how many come before. Else they are all alike.
  std::vector<Counts> before_;
};

}  // namespace numattn
