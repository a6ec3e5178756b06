#include "plan/gradient_plan.h"

#include <algorithm>

#include "plan/index.h"

namespace numattn {
namespace {

// Work items for each thread, so that none waits long for another's last one.
constexpr int64_t kItemsPerThread = 4;
// What is worth waking a thread for.
constexpr double kFlopsPerThread = 1e6;

}  // namespace

GradientPlan::GradientPlan(const GradientProblem& problem, const DtypeKernels& kernels,
                           const BlockKinds* block_kinds, int num_threads)
    : problem_(problem),
      forward_(problem.forward),
      kernels_(kernels),
      block_kinds_(block_kinds),
      sequences_(forward_) {
  double work = 0;
  int64_t most_keys = 0;
  const int64_t different = sequences_.are_alike() ? 1 : sequences_.count();
  for (int64_t i = 0; i < different; ++i) {
    const Sequence here = sequences_[i];
    work += cost(here);
    most_keys = std::max(most_keys, here.keys);
  }
  if (sequences_.are_alike()) work *= static_cast<double>(sequences_.count());
  threads_ =
      static_cast<int>(std::clamp(work / kFlopsPerThread, 1.0, static_cast<double>(num_threads)));

  queries_per_item_ = kernels.max_backward_queries(forward_.head_dim, forward_.value_dim);
  const auto count = [&] {
    before_.clear();
    items_ = 0;
    for (int64_t i = 0; i < different; ++i) {
      before_.push_back(items_);
      items_ += items_of(sequences_[i]);
    }
    before_.push_back(items_);
    if (sequences_.are_alike()) {
      before_.clear();
      items_ *= sequences_.count();
    }
  };
  // A tile is computed in the same way, however many are in a work item.
  for (count();
       items_ < kItemsPerThread * threads_ && queries_per_item_ > kernels.queries_per_backward_tile;
       count()) {
    const int64_t tiles = queries_per_item_ / kernels.queries_per_backward_tile;
    queries_per_item_ = tiles / 2 * kernels.queries_per_backward_tile;
  }
  chunk_groups_ = problem.dbias.data ? 1 : sequences_.count() * forward_.kv_heads;
  chunks_per_item_ = quotient_up(most_keys, kernels.keys_per_backward_chunk);
  threads_ = static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(items_, 1)));
}

int64_t GradientPlan::items_of(const Sequence& sequence) const {
  return forward_.query_heads * quotient_up(sequence.queries, queries_per_item_);
}

double GradientPlan::cost(const Sequence& sequence) const {
  const TileKeys attended = sequences_.keys_of(sequence);
  const auto dims = static_cast<double>(3 * forward_.head_dim + 2 * forward_.value_dim);
  const auto keys = static_cast<double>(std::max<int64_t>(attended.end - attended.begin, 0));
  return 2.0 * static_cast<double>(forward_.query_heads * sequence.queries) * keys * dims;
}

GradientItem GradientPlan::item(int64_t number) const {
  int64_t batch_item, before;
  if (before_.empty()) {
    const int64_t each = items_of(sequences_[0]);
    batch_item = number / each;
    before = batch_item * each;
  } else {
    const auto after = std::upper_bound(before_.begin(), before_.end(), number);
    batch_item = after - before_.begin() - 1;
    before = before_[static_cast<size_t>(batch_item)];
  }
  const Sequence sequence = sequences_[batch_item];
  const int64_t blocks = quotient_up(sequence.queries, queries_per_item_);
  const int64_t head = (number - before) / blocks;
  const int64_t kv_head = head / group();
  int64_t block = (number - before) % blocks;
  if (last_queries_come_first(forward_.options)) block = blocks - 1 - block;
  const int64_t first_query = block * queries_per_item_;

  GradientItem item;
  const bool shares_all = chunk_groups_ == 1;
  const int64_t first_of_kv_head = before + kv_head * group() * blocks;
  item.turn = shares_all ? number : number - first_of_kv_head;
  item.first_chunk = shares_all ? 0 : (batch_item * forward_.kv_heads + kv_head) * chunks_per_item_;

  GradientTask& task = item.task;
  const int64_t row = sequence.first_query + first_query;
  sequences_.set_arrays(task, sequence, head, 1, first_query,
                        std::min(queries_per_item_, sequence.queries - first_query));
  task.stage = Stage::attention;
  task.dout_is_float32 = problem_.dout_is_float32;
  task.dout = sequences_.moved(problem_.dout, sequence, head, row);
  task.dlse = sequences_.moved(problem_.dlse, sequence, head, row);
  task.dq = sequences_.moved(problem_.dq, sequence, head, row);
  task.dk = sequences_.moved(problem_.dk, sequence, kv_head, sequence.first_key);
  task.dv = sequences_.moved(problem_.dv, sequence, kv_head, sequence.first_key);
  task.dbias = sequences_.moved(problem_.dbias, problem_.dbias_batch_strides, sequence, head, row);
  task.block_kinds = block_kinds_ ? block_kinds_->of_tile(batch_item, head, first_query) : nullptr;
  task.block_kinds_stride = block_kinds_ ? block_kinds_->tile_stride() : 0;
  int tile = 0;
  for (int64_t query = 0; query < task.queries; query += kernels_.queries_per_backward_tile) {
    const int64_t queries =
        std::min<int64_t>(kernels_.queries_per_backward_tile, task.queries - query);
    task.tile_keys[tile++] =
        tile_keys(task.options, task.first_position + query, queries, 0, sequence.valid_keys);
  }
  return item;
}

}  // namespace numattn
