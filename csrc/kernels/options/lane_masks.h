// Limits and dense masks of a block as bits: attended [key], bit i for query lane i.
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"

namespace numattn {
namespace {

inline uint64_t lowest_bits(int64_t count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Which queries keep a key under position - left <= key <= position + right, where lane i has
// position first_position + i: always lanes that stand side by side.
inline void keep_within_window(uint64_t* attended, int64_t first_key, int64_t keys,
                               int64_t first_position, int64_t left, int64_t right) {
  for (int64_t i = 0; i < keys; ++i) {
    const int64_t distance = first_key + i - first_position;
    attended[i] &= lowest_bits(distance + left + 1) & ~lowest_bits(distance - right);
  }
}

// One bit for each of eight rows of a mask, transposed: lanes [key], bit r for row r. The rows'
// bytes are taken together by shifting and or-ing, which the compiler turns into vector code.
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

// mask [row][key] in memory: bytes, 0 is masked; strides in bytes. At most kMaxKeys keys.
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

// bias [row][key] of Elements in memory: -inf is masked; strides in bytes. Lanes from `first_lane`
// on are the rows.
template <class Element>
void keep_unbiased(uint64_t* attended, int64_t keys, const char* bias, int64_t row_stride,
                   int64_t column_stride, int64_t rows, int64_t first_lane = 0) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < keys; ++i) {
      Element x;
      __builtin_memcpy(&x, bias + row * row_stride + i * column_stride, sizeof(x));
      if (is_minus_infinity(x)) attended[i] &= ~(uint64_t{1} << (first_lane + row));
    }
  }
}

}  // namespace
}  // namespace numattn
