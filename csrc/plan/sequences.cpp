#include "plan/sequences.h"

#include <algorithm>

#include "plan/index.h"

namespace numattn {

Sequences::Sequences(const Problem& problem)
    : problem_(problem),
      count_(count_batch_items(problem.batch_axes, problem.batch_shape)),
      are_alike_(!problem.query_starts && !problem.q_offset && !problem.kv_lengths &&
                 !problem.q_lengths) {}

Sequence Sequences::operator[](int64_t batch_item) const {
  Sequence sequence{batch_item, 0, problem_.query_length, 0, problem_.key_length, 0, 0};
  if (problem_.query_starts) {
    const int64_t* const q = problem_.query_starts + batch_item;
    const int64_t* const k = problem_.key_starts + batch_item;
    sequence = {batch_item, q[0], q[1] - q[0], k[0], k[1] - k[0], 0, 0};
  }
  if (problem_.q_lengths) sequence.queries = problem_.q_lengths[batch_item];
  sequence.valid_keys = problem_.kv_lengths ? problem_.kv_lengths[batch_item] : sequence.keys;
  sequence.first_position =
      problem_.q_offset ? problem_.q_offset[batch_item] : sequence.valid_keys - sequence.queries;
  return sequence;
}

TileKeys Sequences::keys_of(const Sequence& sequence) const {
  return tile_keys(problem_.options, sequence.first_position, sequence.queries, 0,
                   sequence.valid_keys);
}

View Sequences::moved(View view, const int64_t* batch_strides, const Sequence& sequence,
                      int64_t head, int64_t row) const {
  if (!view.data) return view;
  view.data = address(view, head, row) + batch_offset(problem_.batch_axes, problem_.batch_shape,
                                                      batch_strides, sequence.batch_item);
  return view;
}

KeyRows Sequences::key_rows(const Array& rows, const Array& scales, bool is_int8, int64_t dims,
                            const Sequence& sequence, int64_t kv_head) const {
  KeyRows keys{rows, dims, is_int8, scales, nullptr, 0, 0, 0};
  if (!problem_.block_table) {
    keys.rows = moved(rows, sequence, kv_head, sequence.first_key);
    keys.scales = moved(scales, sequence, kv_head, sequence.first_key);
    return keys;
  }
  keys.rows.data = address(rows, kv_head, 0);
  if (scales.data) keys.scales.data = address(scales, kv_head, 0);
  keys.pages = problem_.block_table + sequence.batch_item * problem_.pages_per_item;
  keys.page_size = problem_.page_size;
  keys.page_stride = rows.page_stride;
  keys.scale_page_stride = scales.page_stride;
  return keys;
}

void Sequences::set_arrays(Task& task, const Sequence& sequence, int64_t head, int64_t heads,
                           int64_t first_query, int64_t queries) const {
  const int64_t row = sequence.first_query + first_query;
  const int64_t kv_head = head / (problem_.query_heads / problem_.kv_heads);
  task.kv_heads = 1;
  task.heads = heads;
  task.queries = queries;
  task.head_dim = problem_.head_dim;
  task.value_dim = problem_.value_dim;
  task.q = moved(problem_.q, sequence, head, row);
  task.k = key_rows(problem_.k, problem_.k_scales, problem_.k_is_int8, problem_.head_dim, sequence,
                    kv_head);
  task.v = key_rows(problem_.v, problem_.v_scales, problem_.v_is_int8, problem_.value_dim, sequence,
                    kv_head);
  task.out = moved(problem_.out, sequence, head, row);
  task.out_is_float32 = problem_.out_is_float32;
  task.lse = moved(problem_.lse, sequence, head, row);

  Options& options = task.options = options_from_head(problem_.options, head);
  options.mask = moved(options.mask, problem_.mask_batch_strides, sequence, head, row);
  task.mask_begin = options.tail_mask_keys < 0 ? 0 : sequence.valid_keys - options.tail_mask_keys;
  options.bias = moved(options.bias, problem_.bias_batch_strides, sequence, head, row);

  task.batch_item = sequence.batch_item;
  task.first_head = head;
  task.first_row = first_query;
  task.weight_exponent = 0;
  task.first_position = sequence.first_position + first_query;
}

void Sequences::set_tiles(Task& task, const Sequence& sequence, const BlockKinds* block_kinds,
                          int64_t head, int64_t first_query, int64_t queries_per_tile) const {
  task.block_kinds =
      block_kinds ? block_kinds->of_tile(sequence.batch_item, head, first_query) : nullptr;
  task.block_kinds_stride = block_kinds ? block_kinds->tile_stride() : 0;
  int tile = 0;
  for (int64_t query = 0; query < task.queries; query += queries_per_tile, ++tile) {
    TileKeys& keys = task.tile_keys[tile] =
        tile_keys(task.options, task.first_position + query,
                  std::min(queries_per_tile, task.queries - query), 0, sequence.valid_keys);
    if (block_kinds) {
      keys =
          block_kinds->without_empty_ends(keys, task.block_kinds + tile * task.block_kinds_stride);
    }
  }
}

}  // namespace numattn
