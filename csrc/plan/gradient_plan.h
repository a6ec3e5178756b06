// Divides a gradient problem into work items. An item is a block of consecutive queries of one
// head, with all the keys that they attend to.
//
// The work items of one KV head add to the same dK and dV. So the keys are cut into chunks, and
// each chunk takes the items of its KV head in order, one at a time: an item follows the item
// before it through the chunks. The sums are therefore the same for any number of threads, and no
// thread needs its own copy of dK and dV. If heads or batch items share the gradient of a bias, the
// chunks take the items of all KV heads.
#pragma once

#include <cstdint>
#include <vector>

#include "gradients.h"
#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "plan/sequences.h"

namespace numattn {

struct GradientItem {
  GradientTask task;   // without scratch, parts and stop function: the executing thread sets them
  int64_t chunks;      // of its KV head
  int64_t first_turn;  // index of the first chunk's turn counter among all counters
  int64_t turn;        // the number of items that each of these chunks takes before this one
  bool is_last;        // of its KV head
  // The rows of dk_part and the blocks of part_of_block that the KV heads before its own use.
  int64_t first_part_row, first_part_block;
};

class GradientPlan {
 public:
  // Throws std::bad_alloc. `block_kinds`, for tiles of the backward pass, is null if the problem
  // has no mask. All arguments are kept by reference.
  GradientPlan(const GradientProblem& problem, const DtypeKernels& kernels,
               const BlockKinds* block_kinds, int num_threads);

  int64_t items() const { return items_; }
  int threads() const { return threads_; }
  int64_t turns() const { return turns_; }  // counters, one for each chunk
  // Whether dK and dV are summed in parts; if so, the rows and the blocks of all KV heads.
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
  // The items and the chunks before each batch item. items_before_ ends with the total. Both are
  // empty if there are several batch items and all are alike.
  std::vector<int64_t> items_before_, chunks_before_;
};

}  // namespace numattn
