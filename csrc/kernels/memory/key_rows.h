// The rows of K or V of a chunk as decoding reads them: one after another, each from beginning to
// end, and fetched ahead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/key_block.h"
#include "kernels/table.h"

namespace numattn {
namespace {

constexpr int64_t kBytesPerLine = 64;
// How far ahead rows are fetched. What a CPU fetches by itself loses its way between K and V, and
// in pages never finds it; 8 KiB ahead, and no more, gives 1.5 to 2.5 times the speed (Zen 5).
constexpr int64_t kBytesAhead = 8192;

// Where the rows of a chunk begin: [key - first key of the chunk], and kKeysPerDecodeBlock more for
// who fetches ahead, which repeat the last one.
inline void find_rows(const KeyRows& rows, int64_t first, int64_t end, const char** pointers) {
  const char* row = nullptr;
  int64_t left_in_page = 0;
  for (int64_t key = first; key < end; ++key) {
    if (left_in_page == 0) {
      row = key_row(rows, key);
      left_in_page = rows.pages ? rows.page_size - key % rows.page_size : end - first;
    }
    *pointers++ = row;
    row += rows.row_stride;
    --left_in_page;
  }
  const char* const last = pointers[-1];
  for (int i = 0; i < kKeysPerDecodeBlock; ++i) *pointers++ = last;
}

// Where several heads go through the same keys, how many at a time: their rows stay in the nearest
// caches from one head to the next. Parts of 8, 16 and 32 values differ by some percent.
constexpr int64_t kKeysTogether = 8;
constexpr int64_t kValuesTogether = 16;

// The bytes of a key that are read one after another: its rows of all heads of a task.
inline int64_t bytes_of_key(const KeyRows& rows, int64_t kv_heads) {
  return kv_heads * rows.dims * rows.column_stride;
}

// How many keys ahead their rows are fetched; 0 where elements stand apart or in reverse, which
// are not fetched. Where several heads go through the same keys, it is the next ones.
inline int64_t keys_ahead(const KeyRows& rows, int64_t kv_heads) {
  const int64_t bytes = bytes_of_key(rows, kv_heads);
  if (bytes <= 0 || bytes > kBytesAhead) return 0;
  const int64_t ahead = kBytesAhead / bytes;
  const int64_t least = kv_heads > 1 ? kValuesTogether : 4;
  return ahead < least ? least : ahead > kKeysPerDecodeBlock ? kKeysPerDecodeBlock : ahead;
}

// Fetches the rows of `keys` keys evenly spread over `steps` steps.
class FetchAhead {
 public:
  // `from` are the rows that are read in these steps.
  FetchAhead(const KeyRows& rows, int64_t kv_heads, const char* const* from, int64_t keys,
             int64_t steps)
      : bytes_(bytes_of_key(rows, kv_heads)),
        next_(from + keys_ahead(rows, kv_heads)),
        keys_per_step_(keys_ahead(rows, kv_heads) > 0 ? keys * kOne / steps : 0) {}

  void next(int steps) {
    due_ += steps * keys_per_step_;
    for (; due_ >= kOne; due_ -= kOne) {
      const char* const row = *next_++;
      int64_t i = 0;
      do {
        __builtin_prefetch(row + i, 0, 3);
        i += kBytesPerLine;
      } while (i < bytes_);
    }
  }

 private:
  static constexpr int64_t kOne = 1 << 16;

  int64_t bytes_;  // of a key
  const char* const* next_;
  int64_t keys_per_step_;  // in units of 1 / kOne
  int64_t due_ = kOne / 2;
};

// Rows whose elements do not stand side by side, copied: [row][d] of Elements of `size` bytes.
inline void gather_rows(const char* const* rows, int64_t count, int64_t dims, int64_t column_stride,
                        int64_t size, char* copy, const char** copied_rows) {
  for (int64_t i = 0; i < count; ++i) {
    copied_rows[i] = copy;
    for (int64_t d = 0; d < dims; ++d, copy += size) {
      __builtin_memcpy(copy, rows[i] + d * column_stride, static_cast<size_t>(size));
    }
  }
}

}  // namespace
}  // namespace numattn
