// Which query and which key a lane of the logits belongs to. Options, masks and softmax are written
// in terms of a lane map, so that the same code serves every driver.
//
// A row is a query of one head; the rows of a task are numbered [head][query]. Logits are
// [key][row], with kWidth places for the rows of a key, and are processed in steps of kVectors
// vectors. If a key has fewer places than a vector has lanes, a step has several keys.
#pragma once

#include <cstdint>

#include "kernels/task.h"

namespace numattn {
namespace {

// Consecutive queries of consecutive heads of a task, the same queries of each head.
struct QueryRows {
  int64_t first_query, queries, heads;
  int64_t first_head = 0;

  int64_t count() const { return heads * queries; }
  int64_t head(int64_t row) const { return first_head + row / queries; }
  int64_t query(int64_t row) const { return first_query + row % queries; }
};

// Consecutive keys of one block, and what is known about how rows attend to them.
struct KeySpan {
  int64_t first, count;
  bool within_limits;  // every row attends to all of them, as far as limits decide
  bool mask_is_full;   // every row attends to all of them, as far as the dense mask decides
};

template <class VectorsOfLevel, int kPlaces>
struct LaneMap {
  using Vectors = VectorsOfLevel;
  static constexpr int kWidth = kPlaces;
  static constexpr int kVectors = kWidth < Vectors::kLanes ? 1 : kWidth / Vectors::kLanes;
  static constexpr int kLanes = kVectors * Vectors::kLanes;  // of a step
  static constexpr int kKeysPerStep = kLanes / kWidth;

  QueryRows rows;

  static int64_t steps(int64_t keys) { return (keys + kKeysPerStep - 1) / kKeysPerStep; }
  static int row(int lane) { return lane % kWidth; }
  static int key(int lane) { return lane / kWidth; }  // of the keys of its step
};

// The map of a tile whose lanes are consecutive queries of one head.
template <class Vectors, int kVectors>
using TileMap = LaneMap<Vectors, kVectors * Vectors::kLanes>;

}  // namespace
}  // namespace numattn
