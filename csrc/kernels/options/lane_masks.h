// Which rows attend to which keys, as bits: attended [key], bit r for row r.
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"
#include "kernels/options/lane_map.h"
#include "kernels/task.h"

namespace numattn {
namespace {

inline uint64_t lowest_bits(int64_t count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Clears the bits of queries for which a key is outside position - left ... position + right, where
// query i has position first_position + i.
inline void keep_within_window(uint64_t* attended, int64_t first_key, int64_t keys,
                               int64_t first_position, int64_t left, int64_t right) {
  for (int64_t i = 0; i < keys; ++i) {
    const int64_t distance = first_key + i - first_position;
    attended[i] &= lowest_bits(distance + left + 1) & ~lowest_bits(distance - right);
  }
}

// One bit for each of up to eight rows of a mask, transposed: lanes [key], bit r for row r. The
// bytes of a row are combined with shifts and ors, which the compiler turns into vector code.
inline void transpose_rows(const char* mask, int64_t row_stride, int64_t column_stride,
                           int64_t rows, int64_t keys, uint8_t* __restrict lanes) {
  for (int64_t i = 0; i < keys; ++i) lanes[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* const from = reinterpret_cast<const uint8_t*>(mask + r * row_stride);
    if (column_stride == 1) {
      for (int64_t i = 0; i < keys; ++i) {
        lanes[i] = static_cast<uint8_t>(lanes[i] | (from[i] != 0) << r);
      }
    } else {
      for (int64_t i = 0; i < keys; ++i) {
        lanes[i] = static_cast<uint8_t>(lanes[i] | (from[i * column_stride] != 0) << r);
      }
    }
  }
}

// mask [row][key] in memory: bytes, 0 is masked; strides in bytes.
template <int64_t kMaxKeys>
void keep_unmasked(uint64_t* attended, int64_t keys, const char* mask, int64_t row_stride,
                   int64_t column_stride, int64_t rows) {
  for (int64_t row = 0; row < rows; row += 8) {
    uint8_t lanes[kMaxKeys];
    transpose_rows(mask + row * row_stride, row_stride, column_stride,
                   rows - row < 8 ? rows - row : 8, keys, lanes);
    const uint64_t others = ~(uint64_t{0xff} << row);
    for (int64_t i = 0; i < keys; ++i) {
      attended[i] &= others | static_cast<uint64_t>(lanes[i]) << row;
    }
  }
}

// Eight bits of a row of a mask's block, from any of its keys on.
inline uint64_t eight_bits(const uint8_t* row, int64_t key, int64_t bytes) {
  const int64_t byte = key / 8;
  const int shift = static_cast<int>(key % 8);
  const unsigned low = static_cast<unsigned>(row[byte]) >> shift;
  if (shift == 0 || byte + 1 == bytes) return low;
  return (low | static_cast<unsigned>(row[byte + 1]) << (8 - shift)) & 0xff;
}

// Byte r, bit k becomes byte k, bit r.
inline uint64_t transpose_bits(uint64_t x) {
  uint64_t swapped = (x ^ (x >> 7)) & 0x00aa00aa00aa00aa;
  x ^= swapped ^ (swapped << 7);
  swapped = (x ^ (x >> 14)) & 0x0000cccc0000cccc;
  x ^= swapped ^ (swapped << 14);
  swapped = (x ^ (x >> 28)) & 0x00000000f0f0f0f0;
  return x ^ swapped ^ (swapped << 28);
}

// Applies a mixed block of a mask, bits [query][key / 8]. Bit `lane` + i of attended [j] is kept if
// query `query` + i attends to key `key` + j.
inline void keep_bits(uint64_t* attended, const uint8_t* bits, const MaskBlocks& blocks,
                      int64_t query, int64_t queries, int64_t key, int64_t keys, int64_t lane) {
  const int64_t bytes = (blocks.keys + 7) / 8;
  for (int64_t first = 0; first < queries; first += 8) {
    const int64_t together = queries - first < 8 ? queries - first : 8;
    const uint8_t* const row = bits + (query + first) * bytes;
    const int64_t to = lane + first;
    const uint64_t others = ~(lowest_bits(together) << to);
    for (int64_t j = 0; j < keys; j += 8) {
      uint64_t eight = 0;
      for (int64_t r = 0; r < together; ++r) {
        eight |= eight_bits(row + r * bytes, key + j, bytes) << (8 * r);
      }
      eight = transpose_bits(eight);
      for (int64_t i = j; i < keys && i < j + 8; ++i, eight >>= 8) {
        attended[i] &= others | (eight & 0xff) << to;
      }
    }
  }
}

// Applies the blocks of a mask to adjacent queries, whose bits begin at bit 0.
inline void keep_unmasked(uint64_t* attended, const MaskBlocks& blocks, const char* numbers,
                          int64_t first_query, int64_t queries, int64_t first_key, int64_t keys) {
  for (int64_t i = 0; i < queries;) {
    const int64_t row = (first_query + i) / blocks.queries;
    const int64_t query = (first_query + i) % blocks.queries;
    const int64_t rows =
        blocks.queries - query < queries - i ? blocks.queries - query : queries - i;
    for (int64_t j = 0; j < keys;) {
      const int64_t column = (first_key + j) / blocks.keys, key = (first_key + j) % blocks.keys;
      const int64_t columns = blocks.keys - key < keys - j ? blocks.keys - key : keys - j;
      const int32_t number =
          reinterpret_cast<const int32_t*>(numbers + row * blocks.row_stride)[column];
      if (number >= 0) {
        const int64_t block_bytes = blocks.queries * ((blocks.keys + 7) / 8);
        keep_bits(attended + j, blocks.bits + number * block_bytes, blocks, query, rows, key,
                  columns, i);
      } else if (number == MaskBlocks::kEmpty) {
        const uint64_t others = ~(lowest_bits(rows) << i);
        for (int64_t k = j; k < j + columns; ++k) attended[k] &= others;
      }
      j += columns;
    }
    i += rows;
  }
}

// The elements of a mask or bias for one row, from one of its columns on.
inline const char* pairs_of(const View& pairs, const QueryRows& rows, int64_t row, int64_t column) {
  return pairs.data + rows.head(row) * pairs.head_stride + rows.query(row) * pairs.row_stride +
         column * pairs.column_stride;
}

// Finds what limits and the mask leave, for at most kMaxKeys keys.
template <int64_t kMaxKeys>
void find_attended(const Task& task, const QueryRows& rows, const KeySpan& keys,
                   uint64_t* attended) {
  const Options& options = task.options;
  uint64_t of_any_head[kMaxKeys];  // limits are the same for all heads
  for (int64_t key = 0; key < keys.count; ++key) of_any_head[key] = lowest_bits(rows.queries);
  if (!keys.within_limits) {
    keep_within_window(of_any_head, keys.first, keys.count, task.first_position + rows.first_query,
                       options.window_left, options.window_right);
  }
  for (int64_t key = 0; key < keys.count; ++key) attended[key] = 0;
  // Keys before the first column of the mask.
  const int64_t before = task.mask_begin > keys.first ? task.mask_begin - keys.first : 0;
  const int64_t column = keys.first + before - task.mask_begin;
  for (int64_t row = 0; row < rows.count(); row += rows.queries) {
    uint64_t of_head[kMaxKeys];
    for (int64_t key = 0; key < keys.count; ++key) of_head[key] = of_any_head[key];
    if (!keys.mask_is_full && options.mask_blocks.queries > 0) {
      keep_unmasked(of_head, options.mask_blocks, pairs_of(options.mask, rows, row, 0),
                    task.first_row + rows.query(row), rows.queries, keys.first, keys.count);
    } else if (!keys.mask_is_full && before < keys.count) {
      keep_unmasked<kMaxKeys>(of_head + before, keys.count - before,
                              pairs_of(options.mask, rows, row, column), options.mask.row_stride,
                              options.mask.column_stride, rows.queries);
    }
    for (int64_t key = 0; key < keys.count; ++key) attended[key] |= of_head[key] << row;
  }
}

// A bias of -inf masks too. The logits are already -inf; this is for values that must not be read.
template <class Element>
void keep_unbiased(const Options& options, const QueryRows& rows, const KeySpan& keys,
                   uint64_t* attended) {
  with_stored_type<float, Element>(options.bias_is_float32, [&]<class Type>(Stored<Type>) {
    for (int64_t row = 0; row < rows.count(); ++row) {
      const char* const bias = pairs_of(options.bias, rows, row, keys.first);
      for (int64_t i = 0; i < keys.count; ++i) {
        Type x;
        __builtin_memcpy(&x, bias + i * options.bias.column_stride, sizeof(x));
        if (is_minus_infinity(x)) attended[i] &= ~(uint64_t{1} << row);
      }
    }
  });
}

}  // namespace
}  // namespace numattn
