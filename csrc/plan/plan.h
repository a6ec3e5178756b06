// From a problem to work items.
//
// What a work item is depends on the sequence:
// - prefill, many queries: a block of consecutive queries of one head, with all the keys that they
//   attend to;
// - decode, few rows (queries of all heads that share a KV head): all of them, with a chunk of the
//   keys; whoever computes the last chunk merges their states. KV heads whose rows are adjacent in
//   memory go into one work item, so that memory is read from beginning to end;
// - decode by tiles, few queries but many rows: the same by tiles of whole heads, as many as a work
//   item may have;
// - small heads, few queries and few keys: as many heads of a batch item as make it worth a
//   thread's while;
// - stages by themselves: some queries of one head with all keys, or all queries with a chunk of
//   the keys.
// Where weights are dropped it is prefill, whatever the lengths: dropout is for training.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "plan/block_kinds.h"
#include "plan/sequences.h"
#include "problem.h"

namespace numattn {

// What computes a sequence.
enum class Driver : uint8_t { prefill, decode, decode_tiles, small_heads, stage };

constexpr bool decodes(Driver driver) {
  return driver == Driver::decode || driver == Driver::decode_tiles;
}

struct WorkItem {
  Task task;  // without state, scratch and stop function: the executing thread has them
  Driver driver;
  // For decode: the number of chunks that a KV head reads, which of them this is, and the number
  // of its state (for the first KV head) among all states [KV head][some heads][chunk]. A single
  // chunk keeps its state in the thread's scratch.
  int64_t chunks, chunk, state;
};

class Plan {
 public:
  // Throws std::bad_alloc. `block_kinds` is null where the problem has no mask or no prefill. All
  // are kept by reference.
  Plan(const Problem& problem, const DtypeKernels& kernels, const BlockKinds* block_kinds,
       int num_threads);

  // Whether all sequences have so few queries that no tile of queries is ever made.
  static bool has_no_prefill(const Problem& problem, const DtypeKernels& kernels);

  int64_t items() const { return items_; }
  int64_t states() const { return states_; }
  int64_t max_decode_rows() const { return max_decode_rows_; }  // of any work item
  // No more than num_threads, and fewer where the work is not worth waking a thread for.
  int threads() const { return threads_; }

  // Prefill items of one head are consecutive, so that its keys stay in the cache; the longest
  // comes first.
  WorkItem item(int64_t number) const;

 private:
  struct Chunks {
    int64_t first, count;
  };
  struct Counts {
    int64_t items, states;
  };
  // Of decode: some KV heads with all of their query heads, or one with whole tiles of them.
  struct HeadsPerItem {
    int64_t kv_heads, query_heads;
  };

  // A matter of the sequence's own lengths, the heads and the options alone.
  Driver driver(const Sequence& sequence) const;
  int64_t group() const { return problem_.query_heads / problem_.kv_heads; }
  int64_t adjacent_kv_heads() const;
  int64_t queries_per_item() const { return tiles_per_item_ * kernels_.queries_per_tile; }
  HeadsPerItem heads_per_item(const Sequence& sequence) const;
  int64_t decode_rows(const Sequence& sequence) const;  // of a work item; 0 if not decoded
  Counts counts(const Sequence& sequence) const;
  // The chunks of keys that decoding reads: one at least.
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
  // [batch item + 1], how many come before; empty where the batch items are all alike.
  std::vector<Counts> before_;
};

}  // namespace numattn
