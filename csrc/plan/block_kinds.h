// Whether a mask leaves all, some or none of each query tile in each key block. This is found once
// for each distinct slice of the mask: a mask that heads or batch items share is read once for all
// of them. Dense masks and masks by blocks are both described this way. The blocks of a mask by
// blocks are not the kernels' key blocks.
//
// Each query tile and key block takes one byte. A dense mask is hundreds to thousands of times
// larger. The bits of a mixed block are made from the mask when the block is computed. That costs a
// few hundred instructions, and the block itself takes tens of thousands.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "problem.h"

namespace numattn {

class BlockKinds {
 public:
  // Throws std::bad_alloc. The problem is kept by reference.
  BlockKinds(const Problem& problem, int64_t queries_per_tile, int64_t keys_per_block);

  // Must be called before any kind is read. Returns false if it was stopped.
  bool classify_all(const Execution& execution);

  // [key block], for the tile that begins with query `first_query`.
  const BlockKind* of_tile(int64_t batch_item, int64_t head, int64_t first_query) const;
  // A tile's keys without the blocks at both ends that its mask leaves empty.
  TileKeys without_empty_ends(TileKeys keys, const BlockKind* of_tile) const;

  // Elements from one tile to the next: 0 if the mask is the same for all queries.
  int64_t tile_stride() const { return tiles_per_slice_ == 1 ? 0 : blocks_; }

 private:
  int64_t tiles() const { return slices_ * tiles_per_slice_; }  // of all slices
  void classify(int64_t tile);
  BlockKind of_bytes(const char* data, int64_t queries, int64_t keys) const;
  BlockKind of_blocks(const char* numbers, int64_t first_query, int64_t queries, int64_t first_key,
                      int64_t keys) const;

  const Problem& problem_;
  int64_t queries_per_tile_, keys_per_block_;
  int64_t blocks_, tiles_per_slice_, slices_;
  int64_t head_slices_;                         // per batch slice
  int64_t batch_slice_strides_[kMaxBatchAxes];  // in slices; 0 if the mask is broadcast
  std::vector<BlockKind> kinds_;                // [slice][tile][key block]
  std::vector<const char*> slice_data_;         // [slice]
};

}  // namespace numattn
