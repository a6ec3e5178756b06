// What a dense mask leaves of each query tile in each key block, found once for each distinct
// slice of the mask: a mask that heads or batch items share is read once for all of them.
//
// One byte for a tile of queries and a block of keys, several hundred to some thousand times less
// than the mask itself. The bits of a mixed tile are made from the mask when the tile is
// computed: that costs a few hundred instructions where the tile takes ten thousands.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "problem.h"

namespace numattn {

// The offset in bytes of a batch item, given in row-major order, by the strides of one array.
int64_t batch_offset(const Problem& problem, const int64_t* batch_strides, int64_t batch_item);

class BlockKinds {
 public:
  // Throws std::bad_alloc. The problem is kept by reference.
  BlockKinds(const Problem& problem, const DtypeKernels& kernels);

  // One tile of one slice. All rows have to be classified before they are read; different rows
  // may be classified by different threads.
  int64_t rows() const { return slices_ * tiles_; }
  void classify(int64_t row);

  // [key block], for the tile that begins with query `first_row`.
  const BlockKind* tile(int64_t batch_item, int64_t head, int64_t first_row) const;
  // Elements from one tile to the next: 0 where the mask is the same for all queries.
  int64_t tile_stride() const { return tiles_ == 1 ? 0 : blocks_; }

 private:
  const Problem& problem_;
  int64_t rows_per_tile_, keys_per_block_;
  int64_t blocks_, tiles_, slices_;
  int64_t head_slices_;                         // per batch slice
  int64_t batch_slice_strides_[kMaxBatchAxes];  // in slices; 0 where the mask is broadcast
  std::vector<BlockKind> kinds_;                // [slice][tile][key block]
  std::vector<const char*> slice_data_;         // [slice]
};

}  // namespace numattn
