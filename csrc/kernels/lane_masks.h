// Limits and dense masks of a block as bits: attended [key], bit i for query lane i.
#pragma once

#include <cstdint>

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

// mask [row][key] in memory: bytes, 0 is masked; strides in bytes.
inline void keep_unmasked(uint64_t* attended, int64_t keys, const char* mask, int64_t row_stride,
                          int64_t column_stride, int64_t rows) {
  constexpr int64_t kChunk = 128;
  for (int64_t start = 0; start < keys; start += kChunk) {
    const int64_t count = keys - start < kChunk ? keys - start : kChunk;
    for (int64_t first_row = 0; first_row < rows; first_row += 8) {
      // lanes [key]: bit r for row first_row + r
      uint8_t lanes[kChunk] = {};
      const int64_t last = rows - first_row < 8 ? rows - first_row : 8;
      for (int64_t r = 0; r < last; ++r) {
        const auto* const from = reinterpret_cast<const uint8_t*>(
            mask + (first_row + r) * row_stride + start * column_stride);
        const auto bit = static_cast<uint8_t>(1u << r);
        if (column_stride == 1) {
          for (int64_t i = 0; i < count; ++i) lanes[i] |= from[i] != 0 ? bit : uint8_t{0};
        } else {
          for (int64_t i = 0; i < count; ++i) {
            lanes[i] |= from[i * column_stride] != 0 ? bit : uint8_t{0};
          }
        }
      }
      const uint64_t others = ~(uint64_t{0xff} << first_row);
      for (int64_t i = 0; i < count; ++i) {
        attended[start + i] &= others | (static_cast<uint64_t>(lanes[i]) << first_row);
      }
    }
  }
}

}  // namespace
}  // namespace numattn
