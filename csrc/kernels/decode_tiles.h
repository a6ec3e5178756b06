// Attention for few queries of many heads and a chunk of keys. The rows of query heads that share a
// KV head fill the lanes of tiles. Each block of K and V is read once for all tiles of a work item:
// some heads of one KV head, or all heads of several KV heads. As in decode.h, any thread computes
// a chunk, and chunks are merged in order (decode_state.h).
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/decode_state.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/strided.h"
#include "kernels/prefill.h"
#include "kernels/softmax/overflow.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct DecodeTiles {
  using Vectors = typename Arithmetic::Vectors;
  using Scalar = typename Vectors::Scalar;
  using State = DecodeState<Vectors, Element>;
  using Tiles = Prefill<Arithmetic, Element>;
  using Tile = typename Tiles::Tile;
  using Scratch = typename Tiles::Scratch;
  static constexpr int kMaxQueries = 2 * Vectors::kLanes;
  static_assert(kMaxQueries <= Tile::kMaxQueries, "a tile has all queries of its heads");

  static int64_t scratch_bytes(const Task& task) {
    Arena arena{nullptr, 0};
    Head* heads;
    arena.take(heads, task.kv_heads);
    return arena.used + task.kv_heads * lay_out(nullptr, task).bytes;
  }

  // Puts the keys of tile_keys, which belong to one chunk, into the states at task.state.
  static bool run(const Task& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    Head* heads;
    arena.take(heads, task.kv_heads);
    char* scratch = arena.base + arena.used;
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      Head& head = heads[i];
      head = {task_of_head(task, i), {}, 0, {}};
      head.task.scratch = scratch;
      head.scratch = lay_out(scratch, task);
      scratch += head.scratch.bytes;
      const int64_t rows = rows_of(task).count();
      head.state = State::at(head.task.state, rows, task.value_dim);
      head.state.begin(lanes_of_rows<Vectors>(rows), -__builtin_inf(), 0);
    }
    if (!attend_keys(heads, task.kv_heads)) return false;
    for (int64_t i = 0; i < task.kv_heads; ++i) {
      if (!finish(heads[i])) return false;
    }
    return true;
  }

 private:
  // Some query heads of one KV head.
  struct Head {
    Task task;
    State state;
    int64_t first_row;  // of the state, for the task's first row
    Scratch scratch;
  };

  static Scratch lay_out(void* base, const Task& task) {
    return Tiles::lay_out(base, task.heads, task.queries, task.head_dim, task.value_dim);
  }

  // Heads whose rows are adjacent in memory take turns block by block.
  static bool attend_keys(const Head* heads, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Tiles::begin(heads[i].task, heads[i].scratch, -__builtin_inf());
    }
    const Task& task = heads[0].task;
    const TileKeys& keys = task.tile_keys[0];
    if (keys.begin >= keys.end) return true;
    for (int64_t block = keys.begin / kKeysPerBlock; block * kKeysPerBlock < keys.end; ++block) {
      if (task.should_stop(task.stop_context)) return false;
      for (int64_t i = 0; i < count; ++i) {
        Tiles::attend_block(heads[i].task, heads[i].scratch, block);
      }
    }
    return true;
  }

  // Moves the tiles' results to the state. Results that are not finite are computed once more, with
  // smaller weights, in the memory of the tiles.
  static bool finish(const Head& head) {
    bool is_done[kMaxTilesPerBlock];
    for (int t = 0; t < head.scratch.tile_count; ++t)
      is_done[t] = keep(head, head.scratch.tiles[t]);
    for (int t = 0; head.task.weight_exponent == 0 && t < head.scratch.tile_count; ++t) {
      if (is_done[t]) continue;
      const Tile& tile = head.scratch.tiles[t];
      Head again{Tiles::task_of_tile(head.task, tile, t), head.state, first_row_of(head, tile), {}};
      const TileKeys& keys = again.task.tile_keys[0];
      again.task.weight_exponent = exponent_for(keys.end - keys.begin);
      again.scratch = lay_out(again.task.scratch, again.task);
      if (!attend_keys(&again, 1) || !finish(again)) return false;
    }
    return true;
  }

  static int64_t first_row_of(const Head& head, const Tile& tile) {
    return head.first_row + tile.rows.first_head * tile.rows.queries;
  }

  // False if an output is not finite. It may be finite with smaller weights.
  static bool keep(const Head& head, const Tile& tile) {
    const Task& task = head.task;
    const State& state = head.state;
    const int64_t rows = tile.rows.count();
    const int64_t first_row = first_row_of(head, tile);
    Scalar ones[Tile::kMaxQueries];
    for (Scalar& x : ones) x = 1;
    tile.with_vectors([&](auto vectors) {
      unpack_output<Vectors, Scalar, vectors.value, false>(
          tile.chunk.output, ones, rows, task.value_dim,
          reinterpret_cast<char*>(state.output + first_row * task.value_dim),
          task.value_dim * static_cast<int64_t>(sizeof(Scalar)), sizeof(Scalar));
    });
    for (int64_t row = 0; row < rows; ++row) {
      state.maximum[first_row + row] = tile.chunk.maximum[row];
      state.sum[first_row + row] = tile.chunk.sum[row];
      state.exponent[first_row + row] = task.weight_exponent;
    }
    return state.find_largest(first_row, rows, task.value_dim);
  }
};

}  // namespace
}  // namespace numattn
