#include "plan/block_kinds.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "plan/index.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

// Which values a range of mask bytes contains.
struct Contents {
  bool some_set = false;
  bool some_clear = false;
};

void look_at(const char* bytes, int64_t stride, int64_t count, Contents& contents) {
  int64_t i = 0;
  if (stride == 1) {
    // Eight bytes at a time. A byte is 0 if its top bit is clear and subtracting 1 sets it.
    constexpr uint64_t kOnes = 0x0101010101010101, kTops = 0x8080808080808080;
    uint64_t set = 0, clear = 0;
    for (; i + 8 <= count; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, sizeof(word));
      set |= word;
      clear |= (word - kOnes) & ~word & kTops;
    }
    contents.some_set |= set != 0;
    contents.some_clear |= clear != 0;
  }
  for (; i < count; ++i) {
    (bytes[i * stride] ? contents.some_set : contents.some_clear) = true;
  }
}

BlockKind kind_of(const Contents& contents) {
  if (!contents.some_set) return BlockKind::empty;
  return contents.some_clear ? BlockKind::mixed : BlockKind::full;
}

}  // namespace

BlockKinds::BlockKinds(const Problem& problem, int64_t queries_per_tile, int64_t keys_per_block)
    : problem_(problem), queries_per_tile_(queries_per_tile), keys_per_block_(keys_per_block) {
  const View& mask = problem.options.mask;
  const int64_t* const strides = problem.mask_batch_strides;
  blocks_ = quotient_up(problem.key_length, keys_per_block_);
  const bool is_by_blocks = problem.options.mask_blocks.queries > 0;
  tiles_per_slice_ = mask.row_stride == 0 && !is_by_blocks
                         ? 1
                         : quotient_up(problem.query_length, queries_per_tile_);
  head_slices_ = mask.head_stride == 0 ? 1 : problem.query_heads;
  slices_ = head_slices_;
  for (int axis = problem.batch_axes - 1; axis >= 0; --axis) {
    batch_slice_strides_[axis] = strides[axis] == 0 ? 0 : slices_;
    if (strides[axis] != 0) slices_ *= problem.batch_shape[axis];
  }
  if (static_cast<double>(slices_) * static_cast<double>(tiles_per_slice_) *
          static_cast<double>(blocks_) >
      static_cast<double>(std::numeric_limits<int64_t>::max())) {
    throw std::bad_alloc();  // possible because broadcast axes can have any length
  }
  kinds_.resize(static_cast<std::size_t>(slices_ * tiles_per_slice_ * blocks_));
  slice_data_.resize(static_cast<std::size_t>(slices_));
  const auto offset = [&](const int64_t* batch_strides, int64_t batch_item) {
    return batch_offset(problem.batch_axes, problem.batch_shape, batch_strides, batch_item);
  };
  for (int64_t batch_item = 0;
       batch_item < count_batch_items(problem.batch_axes, problem.batch_shape); ++batch_item) {
    for (int64_t head = 0; head < head_slices_; ++head) {
      const int64_t slice = offset(batch_slice_strides_, batch_item) + head;
      slice_data_[static_cast<std::size_t>(slice)] =
          address(mask, head, 0) + offset(strides, batch_item);
    }
  }
}

bool BlockKinds::classify_all(const Execution& execution) {
  // With fewer bytes, another thread is not worth waking.
  constexpr int64_t kBytesPerThread = 1 << 18;
  const int64_t bytes = tiles() * problem_.key_length;  // fewer for a mask by blocks
  const auto classify = [](void* context, int64_t tile, StopCheck&) {
    static_cast<BlockKinds*>(context)->classify(tile);
    return true;
  };
  return run(
      {classify, this, tiles(),
       static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, execution.num_threads)),
       execution.interrupted});
}

BlockKind BlockKinds::of_bytes(const char* data, int64_t queries, int64_t keys) const {
  const View& mask = problem_.options.mask;
  Contents contents;
  for (int64_t query = 0; query < queries; ++query) {
    look_at(data + query * mask.row_stride, mask.column_stride, keys, contents);
    if (contents.some_set && contents.some_clear) break;
  }
  return kind_of(contents);
}

BlockKind BlockKinds::of_blocks(const char* numbers, int64_t first_query, int64_t queries,
                                int64_t first_key, int64_t keys) const {
  const MaskBlocks& blocks = problem_.options.mask_blocks;
  Contents contents;
  for (int64_t row = first_query / blocks.queries;
       row <= (first_query + queries - 1) / blocks.queries; ++row) {
    const auto* const of_row = reinterpret_cast<const int32_t*>(numbers + row * blocks.row_stride);
    for (int64_t column = first_key / blocks.keys; column <= (first_key + keys - 1) / blocks.keys;
         ++column) {
      contents.some_set |= of_row[column] != MaskBlocks::kEmpty;
      contents.some_clear |= of_row[column] != MaskBlocks::kFull;
    }
  }
  return kind_of(contents);
}

void BlockKinds::classify(int64_t tile) {
  const View& mask = problem_.options.mask;
  const bool is_by_blocks = problem_.options.mask_blocks.queries > 0;
  const int64_t first_query = tile % tiles_per_slice_ * queries_per_tile_;
  const int64_t queries = !is_by_blocks && mask.row_stride == 0
                              ? 1
                              : std::min(queries_per_tile_, problem_.query_length - first_query);
  const char* const data = slice_data_[static_cast<std::size_t>(tile / tiles_per_slice_)];
  for (int64_t block = 0; block < blocks_; ++block) {
    const int64_t first_key = block * keys_per_block_;
    const int64_t keys = std::min(keys_per_block_, problem_.key_length - first_key);
    kinds_[static_cast<std::size_t>(tile * blocks_ + block)] =
        is_by_blocks
            ? of_blocks(data, first_query, queries, first_key, keys)
            : of_bytes(data + first_query * mask.row_stride + first_key * mask.column_stride,
                       queries, keys);
  }
}

const BlockKind* BlockKinds::of_tile(int64_t batch_item, int64_t head, int64_t first_query) const {
  const int64_t slice =
      batch_offset(problem_.batch_axes, problem_.batch_shape, batch_slice_strides_, batch_item) +
      (head_slices_ == 1 ? 0 : head);
  const int64_t tile = tiles_per_slice_ == 1 ? 0 : first_query / queries_per_tile_;
  return kinds_.data() + (slice * tiles_per_slice_ + tile) * blocks_;
}

TileKeys BlockKinds::without_empty_ends(TileKeys keys, const BlockKind* of_tile) const {
  while (keys.begin < keys.end && of_tile[keys.begin / keys_per_block_] == BlockKind::empty) {
    keys.begin = std::min(keys.end, (keys.begin / keys_per_block_ + 1) * keys_per_block_);
  }
  while (keys.begin < keys.end && of_tile[(keys.end - 1) / keys_per_block_] == BlockKind::empty) {
    keys.end = std::max(keys.begin, (keys.end - 1) / keys_per_block_ * keys_per_block_);
  }
  return keys;
}

}  // namespace numattn
