// Block sizes shared by all kernels.
#pragma once

#include <cstdint>

#include "kernels/task.h"

namespace numattn {
namespace {

constexpr int64_t kCacheLine = 64;  // bytes

constexpr int kKeysPerBlock = 96;
// A chunk of keys is summed separately before it is added to the total: the rounding error grows
// with the blocks of a chunk plus the number of chunks. For 20,000 keys it is a third of the error
// of one long sum. Decoding also hands out its work in chunks.
constexpr int64_t kBlocksPerChunk = 16;
constexpr int64_t kKeysPerChunk = kBlocksPerChunk * kKeysPerBlock;

// The register tile of the products: some scalars, broadcast one at a time, times some vectors.
template <class Vectors>
struct RegisterTile {
  static constexpr int kVectors = Vectors::kRegisters >= 32 ? 4 : 2;
  static constexpr int kLanes = kVectors * Vectors::kLanes;

  // How many scalars fit with `vectors` vectors. 6 x 4 are 24 accumulators. With four operands and
  // a broadcast they fill 29 of 32 registers, and 24 multiply-adds need 10 loads. 6 x 2 fill 15 of
  // 16. If products multiply by lane, 24 accumulators, six vectors of scalars and one vector fill
  // 31 of 32. Without fused multiply-add, the products need registers too.
  static constexpr int scalars(int vectors) {
    if (!Vectors::kFusedMultiplyAdd) return 4;
    if (vectors == kVectors) return 6;
    return vectors == 1 && kVectors == 4 ? 12 : 8;
  }

  // Query tiles that share a key block: enough that loading the block from memory does not matter,
  // even if several cores share the memory, and few enough that tiles and block stay in the
  // second-level cache.
  static constexpr int kTilesPerBlock =
      4 * static_cast<int>(sizeof(typename Vectors::Vec)) / kLanes;
  static_assert(kTilesPerBlock <= kMaxTilesPerBlock, "Task and scratch have room for these tiles");
  static_assert(kLanes <= 64, "a lane mask has 64 bits");
};

}  // namespace
}  // namespace numattn
