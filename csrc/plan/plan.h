// Divides a problem into work items.
//
// The content of a work item depends on the sequence:
// - prefill, many queries: a block of consecutive queries of one head, with all the keys that they
//   attend to.
// - decode, few rows (queries of all heads that share a KV head): all of these rows, with a chunk
//   of the keys. The thread that computes the last chunk merges the states of all chunks. KV heads
//   whose rows are adjacent in memory share a work item, so that memory is read sequentially.
// - decode by tiles, few queries but many rows: the same, in tiles of whole heads, as many as a
//   work item may have.
// - small heads, few queries and few keys: enough heads of a batch item to be worth a thread.
// - single stages: some queries of one head with all keys, or all queries with a chunk of the keys.
// With dropout, prefill computes sequences of any length, because dropout is for training.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "plan/sequences.h"
#include "problem.h"

namespace numattn {

// The kernel that computes a sequence.
enum class Driver : uint8_t { prefill, decode, decode_tiles, small_heads, stage };

constexpr bool decodes(Driver driver) {
  return driver == Driver::decode || driver == Driver::decode_tiles;
}

struct WorkItem {
  Task task;  // without state, scratch and stop function: the executing thread sets them
  Driver driver;
  // For decode: the number of chunks that a KV head reads, the index of this chunk, and the index
  // of its state (for the first KV head) among all states [KV head][some heads][chunk]. If there is
  // only one chunk, its state is in the thread's scratch.
  int64_t chunks, chunk, state;
};

class Plan {
 public:
  // Throws std::bad_alloc. `block_kinds` is null if the problem has no mask or no prefill. All
  // arguments are kept by reference.
  Plan(const Problem& problem, const DtypeKernels& kernels, const BlockKinds* block_kinds,
       int num_threads);

  // Whether all sequences have so few queries that none is computed by prefill.
  static bool has_no_prefill(const Problem& problem, const DtypeKernels& kernels);

  int64_t items() const { return items_; }
  int64_t states() const { return states_; }
  int64_t max_decode_rows() const { return max_decode_rows_; }  // of any work item
  // At most num_threads; fewer if there is too little work to wake them all.
  int threads() const { return threads_; }

  // Prefill items of one head are consecutive, so that its keys stay in the cache. The longest item
  // comes first.
  WorkItem item(int64_t number) const;

 private:
  struct Chunks {
    int64_t first, count;
  };
  struct Counts {
    int64_t items, states;
  };
  // For decode: several KV heads with all of their query heads, or one KV head with whole tiles of
  // its query heads.
  struct HeadsPerItem {
    int64_t kv_heads, query_heads;
  };

  // Depends only on the sequence's own lengths, the heads and the options.
  Driver driver(const Sequence& sequence) const;
  int64_t group() const { return problem_.query_heads / problem_.kv_heads; }
  int64_t adjacent_kv_heads() const;
  int64_t queries_per_item() const { return tiles_per_item_ * kernels_.queries_per_tile; }
  HeadsPerItem heads_per_item(const Sequence& sequence) const;
  int64_t decode_rows(const Sequence& sequence) const;  // of a work item; 0 without decode
  Counts counts(const Sequence& sequence) const;
  // The chunks of keys that decode reads, at least one.
  Chunks chunks_read(const Sequence& sequence) const;
  double cost(const Sequence& sequence) const;
  // `local` counts the work items of the sequence.
  void set_prefill(WorkItem& item, const Sequence& sequence, int64_t local) const;
  void set_decode(WorkItem& item, const Sequence& sequence, int64_t local) const;
  void set_small(WorkItem& item, const Sequence& sequence, int64_t local) const;
  void set_stage(WorkItem& item, const Sequence& sequence, int64_t local) const;

  const Problem& problem_;
  const DtypeKernels& kernels_;
  const BlockKinds* block_kinds_;
  Sequences sequences_;
  int64_t tiles_per_item_;     // of prefill, stages and decode by tiles
  int64_t adjacent_kv_heads_;  // of decode
  int64_t small_kv_heads_per_item_;
  int64_t items_, states_;
  int64_t max_decode_rows_ = 0;
  int threads_;
  // [batch item + 1], the items and states before each batch item; empty if all are alike.
  std::vector<Counts> before_;
};

}  // namespace numattn
