#include "plan.h"

#include <algorithm>
#include <limits>

namespace numattn {
namespace {

// Items for each thread, so that none has to wait long for the last one of another.
constexpr int64_t kItemsPerThread = 4;
// A microsecond or two of work: what it takes to hand some of it to a thread that spins.
constexpr double kFlopsPerThread = 5e5;

int64_t batch_items(const Problem& problem) {
  int64_t items = 1;
  for (int axis = 0; axis < problem.batch_axes; ++axis) items *= problem.batch_shape[axis];
  return items;
}

}  // namespace

Plan::Plan(const Problem& problem, const DtypeKernels& kernels, const MaskKinds* mask_kinds,
           int num_threads)
    : problem_(problem), kernels_(kernels), mask_kinds_(mask_kinds) {
  const int64_t heads = batch_items(problem) * problem.query_heads;
  const double flops = 2.0 * static_cast<double>(heads) *
                       static_cast<double>(problem.query_length) *
                       static_cast<double>(problem.key_length) *
                       static_cast<double>(problem.head_dim + problem.value_dim);
  threads_ =
      static_cast<int>(std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(num_threads)));

  // Whatever the block of queries, each of its tiles is computed in the same way: the number of
  // threads may decide here without changing a bit of the result.
  int64_t tiles = kernels.max_tiles_per_block;
  const auto items_with = [&](int64_t tiles_per_item) {
    const int64_t rows = tiles_per_item * kernels.rows_per_tile;
    return heads * ((problem.query_length + rows - 1) / rows);
  };
  while (tiles > 1 && items_with(tiles) < kItemsPerThread * threads_) tiles /= 2;
  rows_per_item_ = tiles * kernels.rows_per_tile;
  items_ = items_with(tiles);
  items_per_head_ = (problem.query_length + rows_per_item_ - 1) / rows_per_item_;
  rows_per_item_ = std::min(rows_per_item_, problem.query_length);
  threads_ = static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(items_, 1)));
}

TileKeys Plan::tile_keys(int64_t first_position, int64_t rows, int64_t valid_keys) const {
  const int64_t last_position = first_position + rows - 1;
  const auto clip = [&](int64_t key) { return std::clamp<int64_t>(key, 0, valid_keys); };
  return {
      clip(first_position - problem_.window_left), clip(last_position + problem_.window_right + 1),
      clip(last_position - problem_.window_left), clip(first_position + problem_.window_right + 1)};
}

Plan::Place Plan::place(int64_t item) const {
  const int64_t head = item / items_per_head_;
  // Under a causal limit the last queries have the most keys.
  int64_t block = item % items_per_head_;
  if (problem_.window_right != kUnbounded) block = items_per_head_ - 1 - block;
  return {head / problem_.query_heads, head % problem_.query_heads, block * rows_per_item_};
}

char* Plan::address(const Array& array, const Place& place) const {
  if (!array.data) return nullptr;
  return array.data + batch_offset(problem_, array.batch_strides, place.batch_item) +
         place.head * array.head_stride + place.first_row * array.row_stride;
}

PrefillTask Plan::task(int64_t item) const {
  const Place here = place(item);
  const auto [batch_item, head, first_row] = here;
  const Place keys{batch_item, head / (problem_.query_heads / problem_.kv_heads), 0};

  PrefillTask task;
  task.rows = std::min(rows_per_item_, problem_.query_length - first_row);
  task.head_dim = problem_.head_dim;
  task.value_dim = problem_.value_dim;

  task.q = address(problem_.q, here);
  task.q_row_stride = problem_.q.row_stride;
  task.q_column_stride = problem_.q.column_stride;
  task.k = address(problem_.k, keys);
  task.k_row_stride = problem_.k.row_stride;
  task.k_column_stride = problem_.k.column_stride;
  task.v = address(problem_.v, keys);
  task.v_row_stride = problem_.v.row_stride;
  task.v_column_stride = problem_.v.column_stride;
  task.out = address(problem_.out, here);
  task.out_row_stride = problem_.out.row_stride;
  task.out_column_stride = problem_.out.column_stride;
  task.lse = address(problem_.lse, here);
  task.lse_stride = problem_.lse.row_stride;

  task.mask = address(problem_.mask, here);
  task.mask_row_stride = problem_.mask.row_stride;
  task.mask_column_stride = problem_.mask.column_stride;
  task.mask_kinds = mask_kinds_ ? mask_kinds_->tile(batch_item, head, first_row) : nullptr;
  task.mask_kinds_stride = mask_kinds_ ? mask_kinds_->tile_stride() : 0;
  task.bias = address(problem_.bias, here);
  task.bias_is_float32 = problem_.bias_is_float32;
  task.bias_row_stride = problem_.bias.row_stride;
  task.bias_column_stride = problem_.bias.column_stride;

  const int64_t valid_keys =
      problem_.kv_lengths ? problem_.kv_lengths[batch_item] : problem_.key_length;
  const int64_t offset =
      problem_.q_offset ? problem_.q_offset[batch_item] : valid_keys - problem_.query_length;
  task.first_position = offset + first_row;
  task.window_left = problem_.window_left;
  task.window_right = problem_.window_right;
  int tile = 0;
  for (int64_t row = 0; row < task.rows; row += kernels_.rows_per_tile) {
    const int64_t rows = std::min<int64_t>(kernels_.rows_per_tile, task.rows - row);
    task.tile_keys[tile++] = tile_keys(task.first_position + row, rows, valid_keys);
  }

  task.scale = problem_.scale;
  task.softcap = problem_.softcap;
  task.alibi_slope = problem_.alibi_slopes ? problem_.alibi_slopes[head] : 0.0;
  task.sink = problem_.sinks ? problem_.sinks[head] : -std::numeric_limits<double>::infinity();
  return task;
}

}  // namespace numattn
