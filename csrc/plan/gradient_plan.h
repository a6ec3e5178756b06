// From a gradient problem to work items: a block of consecutive queries of one head, with all keys
// that they attend to.
//
// Work items of one KV head add to the same dK and dV. So keys are cut into chunks, and each chunk
// takes the items of its KV head in their order, one after the other: an item follows the one
// before it through the chunks. That makes sums the same for any number of threads, without a copy
// of dK and dV for each. Where heads or batch items share the gradient of a bias, the chunks
// take the items of all KV heads.
#pragma once

#include <cstdint>
#include <vector>

#include "gradients.h"
#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "plan/sequences.h"

namespace numattn {

struct GradientItem {
  GradientTask task;   // without scratch, parts and stop function: the executing thread has them
  int64_t chunks;      // of its KV head
  int64_t first_turn;  // the number of the first one's turn among all
  int64_t turn;        // how many items each of these chunks takes before this one
  bool is_last;        // of its KV head
  // Where dk_part and part_of_block of its KV head begin: rows, and blocks, of those before it.
  int64_t first_part_row, first_part_block;
};

class GradientPlan {
 public:
  // Throws std::bad_alloc. `block_kinds`, of tiles of the backward pass, is null where the problem
  // has no mask. All are kept by reference.
  GradientPlan(const GradientProblem& problem, const DtypeKernels& kernels,
               const BlockKinds* block_kinds, int num_threads);

  int64_t items() const { return items_; }
  int threads() const { return threads_; }
  int64_t turns() const { return turns_; }  // one for each chunk
  // Whether dK and dV are summed in parts; for that, how many rows and blocks all KV heads have.
  bool has_parts() const { return has_parts_; }
  int64_t part_rows() const;
  int64_t part_blocks() const { return chunks_ * blocks_per_chunk_; }
  GradientItem item(int64_t number) const;

 private:
  int64_t group() const { return forward_.query_heads / forward_.kv_heads; }
  int64_t items_of(const Sequence& sequence) const;
  int64_t chunks_of(const Sequence& sequence) const;
  int64_t tiles_of(int64_t queries) const;
  bool shares_bias() const;
  double cost(const Sequence& sequence) const;

  const GradientProblem& problem_;
  const Problem& forward_;
  const DtypeKernels& kernels_;
  const BlockKinds* block_kinds_;
  Sequences sequences_;
  int64_t queries_per_item_;
  int64_t items_;
  int64_t chunks_;  // of all KV heads
  int64_t turns_, blocks_per_chunk_;
  bool share_bias_, has_parts_;
  int threads_;
  // How many come before each batch item, the first ones also before the end; empty where several
  // batch items are all alike.
  std::vector<int64_t> items_before_, chunks_before_;
};

}  // namespace numattn
