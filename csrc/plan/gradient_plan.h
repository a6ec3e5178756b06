// From a gradient problem to work items: a block of consecutive queries of one head, with all keys
// that they attend to.
//
// Work items of one KV head add to the same dK and dV. So keys are cut into chunks, and each chunk
// takes the items of its KV head in their order, one after the other: an item follows the one
// before it through the chunks. That makes sums the same for any number of threads, and needs no
// second copy of dK and dV. Where a bias has a gradient, which heads and batch items may share, the
// chunks take all items.
#pragma once

#include <cstdint>
#include <vector>

#include "gradients.h"
#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "plan/sequences.h"

namespace numattn {

struct GradientItem {
  GradientTask task;    // without scratch and stop function: the executing thread has them
  int64_t first_chunk;  // the number of its KV head's chunk of keys 0 among all chunks
  int64_t turn;         // how many items each of these chunks takes before this one
};

class GradientPlan {
 public:
  // Throws std::bad_alloc. `block_kinds`, of tiles of the backward pass, is null where the problem
  // has no mask. All are kept by reference.
  GradientPlan(const GradientProblem& problem, const DtypeKernels& kernels,
               const BlockKinds* block_kinds, int num_threads);

  int64_t items() const { return items_; }
  int threads() const { return threads_; }
  int64_t chunks() const { return chunk_groups_ * chunks_per_item_; }  // of all KV heads
  int64_t chunks_per_item() const { return chunks_per_item_; }
  GradientItem item(int64_t number) const;

 private:
  int64_t group() const { return forward_.query_heads / forward_.kv_heads; }
  int64_t items_of(const Sequence& sequence) const;
  double cost(const Sequence& sequence) const;

  const GradientProblem& problem_;
  const Problem& forward_;
  const DtypeKernels& kernels_;
  const BlockKinds* block_kinds_;
  Sequences sequences_;
  int64_t queries_per_item_;
  int64_t items_;
  int64_t chunk_groups_, chunks_per_item_;
  int threads_;
  // [batch item + 1], how many items come before; empty where the batch items are all alike.
  std::vector<int64_t> before_;
};

}  // namespace numattn
