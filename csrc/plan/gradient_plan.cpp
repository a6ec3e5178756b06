#include "plan/gradient_plan.h"

#include <algorithm>

#include "plan/index.h"

namespace numattn {
namespace {

// Work items for each thread, so that no thread waits long for another's last item.
constexpr int64_t kItemsPerThread = 4;
// The least work that is worth waking a thread for.
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
  int64_t most_tiles = 0;
  const int64_t different = sequences_.are_alike() ? 1 : sequences_.count();
  const int64_t alike = sequences_.are_alike() ? sequences_.count() : 1;
  for (int64_t i = 0; i < different; ++i) {
    const Sequence here = sequences_[i];
    work += cost(here) * static_cast<double>(alike);
    most_tiles = std::max(most_tiles, group() * tiles_of(here.queries));
  }
  threads_ =
      static_cast<int>(std::clamp(work / kFlopsPerThread, 1.0, static_cast<double>(num_threads)));

  const auto count_items = [&] {
    int64_t items = 0;
    for (int64_t i = 0; i < different; ++i) items += items_of(sequences_[i]);
    return alike * items;
  };
  // The number of tiles in a work item does not change how a tile is computed.
  const int64_t tile = kernels.queries_per_backward_tile;
  queries_per_item_ = kernels.max_backward_queries(forward_.head_dim, forward_.value_dim);
  items_ = count_items();
  while (items_ < kItemsPerThread * threads_ && queries_per_item_ > tile) {
    queries_per_item_ = queries_per_item_ / tile / 2 * tile;
    items_ = count_items();
  }
  threads_ = static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(items_, 1)));

  chunks_ = 0;
  int64_t items = 0;
  for (int64_t i = 0; i < different; ++i) {
    if (alike == 1) {
      items_before_.push_back(items);
      chunks_before_.push_back(chunks_);
    }
    items += items_of(sequences_[i]);
    chunks_ += alike * forward_.kv_heads * chunks_of(sequences_[i]);
  }
  if (alike == 1) items_before_.push_back(items);
  share_bias_ = shares_bias();
  // With a bias, all batch items have the same keys: the first one's chunks serve all.
  turns_ = share_bias_ ? chunks_of(sequences_[0]) : chunks_;
  has_parts_ = most_tiles > kernels.tiles_per_backward_part;
  blocks_per_chunk_ = kernels.keys_per_backward_chunk / kernels.keys_per_block;
}

// Whether several KV heads or batch items add to the same element of dbias.
bool GradientPlan::shares_bias() const {
  if (!problem_.dbias.data) return false;
  bool shares = problem_.dbias.head_stride == 0 && forward_.kv_heads > 1;
  for (int axis = 0; axis < forward_.batch_axes; ++axis) {
    shares |= problem_.dbias_batch_strides[axis] == 0 && forward_.batch_shape[axis] > 1;
  }
  return shares;
}

int64_t GradientPlan::tiles_of(int64_t queries) const {
  return quotient_up(queries, kernels_.queries_per_backward_tile);
}

int64_t GradientPlan::items_of(const Sequence& sequence) const {
  return forward_.query_heads * quotient_up(sequence.queries, queries_per_item_);
}

int64_t GradientPlan::chunks_of(const Sequence& sequence) const {
  return quotient_up(sequence.keys, kernels_.keys_per_backward_chunk);
}

// In a ragged batch, key_length counts the keys of all sequences.
int64_t GradientPlan::part_rows() const {
  const int64_t batch_items = forward_.query_starts ? 1 : sequences_.count();
  return batch_items * forward_.kv_heads * forward_.key_length;
}

double GradientPlan::cost(const Sequence& sequence) const {
  const TileKeys attended = sequences_.keys_of(sequence);
  const auto dims = static_cast<double>(3 * forward_.head_dim + 2 * forward_.value_dim);
  const auto keys = static_cast<double>(std::max<int64_t>(attended.end - attended.begin, 0));
  return 2.0 * static_cast<double>(forward_.query_heads * sequence.queries) * keys * dims;
}

GradientItem GradientPlan::item(int64_t number) const {
  int64_t batch_item, before, chunks_before;
  if (items_before_.empty()) {
    const Sequence any = sequences_[0];
    batch_item = number / items_of(any);
    before = batch_item * items_of(any);
    chunks_before = batch_item * forward_.kv_heads * chunks_of(any);
  } else {
    const auto after = std::upper_bound(items_before_.begin(), items_before_.end(), number);
    batch_item = after - items_before_.begin() - 1;
    before = items_before_[static_cast<size_t>(batch_item)];
    chunks_before = chunks_before_[static_cast<size_t>(batch_item)];
  }
  const Sequence sequence = sequences_[batch_item];
  const int64_t blocks = quotient_up(sequence.queries, queries_per_item_);
  const int64_t head = (number - before) / blocks;
  const int64_t kv_head = head / group();
  const bool is_reversed = last_queries_come_first(forward_.options);
  const int64_t place = (number - before) % blocks;  // among the items of its head
  const int64_t block = is_reversed ? blocks - 1 - place : place;
  const int64_t first_query = block * queries_per_item_;
  const int64_t queries = std::min(queries_per_item_, sequence.queries - first_query);

  GradientItem item;
  const int64_t first_of_kv_head = before + kv_head * group() * blocks;
  const int64_t first_chunk = chunks_before + kv_head * chunks_of(sequence);
  item.chunks = chunks_of(sequence);
  item.turn = share_bias_ ? number : number - first_of_kv_head;
  item.first_turn = share_bias_ ? 0 : first_chunk;
  item.is_last = number + 1 == first_of_kv_head + group() * blocks;
  item.first_part_block = first_chunk * blocks_per_chunk_;
  item.first_part_row = forward_.query_starts
                            ? kv_head * forward_.key_length + sequence.first_key
                            : (batch_item * forward_.kv_heads + kv_head) * forward_.key_length;

  GradientTask& task = item.task;
  const int64_t row = sequence.first_query + first_query;
  sequences_.set_arrays(task, sequence, head, 1, first_query, queries);
  const int64_t tiles = tiles_of(sequence.queries), tiles_before = tiles_of(first_query);
  task.first_tile = head % group() * tiles +
                    (is_reversed ? tiles - tiles_before - tiles_of(queries) : tiles_before);
  task.valid_keys = sequence.valid_keys;
  task.stage = Stage::attention;
  task.dout_is_float32 = problem_.dout_is_float32;
  task.dout = sequences_.moved(problem_.dout, sequence, head, row);
  task.dlse = sequences_.moved(problem_.dlse, sequence, head, row);
  task.dq = sequences_.moved(problem_.dq, sequence, head, row);
  task.dk = sequences_.moved(problem_.dk, sequence, kv_head, sequence.first_key);
  task.dv = sequences_.moved(problem_.dv, sequence, kv_head, sequence.first_key);
  task.dbias = sequences_.moved(problem_.dbias, problem_.dbias_batch_strides, sequence, head, row);
  sequences_.set_tiles(task, sequence, block_kinds_, head, first_query,
                       kernels_.queries_per_backward_tile);
  return item;
}

}  // namespace numattn
