// The rows of K or V of a chunk as decoding reads them: one after another, each from beginning to
// end, and fetched ahead.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/stored_types.h"
#include "kernels/memory/strided.h"
#include "kernels/task.h"

namespace numattn {
namespace {

// How far ahead rows are fetched. The hardware prefetcher loses track between K and V, and never
// finds it in pages; 8 KiB ahead, and no more, gives 1.5 to 2.5 times the speed (Zen 5).
constexpr int64_t kBytesAhead = 8192;

// Where several heads take turns on the same keys, the keys of a turn: their rows stay in the
// nearest caches from one head to the next. Turns of 8, 16 and 32 values differ by some percent.
constexpr int64_t kKeysPerTurn = 8;
constexpr int64_t kValuesPerTurn = 16;

// The bytes of a key that are read one after another: its rows of all heads of a task.
inline int64_t bytes_of_key(const KeyRows& keys, int64_t kv_heads) {
  return kv_heads * keys.dims * keys.rows.column_stride;
}

// How many keys ahead their rows are fetched; 0 where elements have gaps or run backwards, which
// are not fetched. Where several heads take turns, the keys of the next turn at least.
inline int64_t keys_ahead(const KeyRows& keys, int64_t kv_heads) {
  const int64_t bytes = bytes_of_key(keys, kv_heads);
  if (bytes <= 0 || bytes > kBytesAhead) return 0;
  const int64_t ahead = kBytesAhead / bytes;
  const int64_t least = kv_heads > 1 ? kValuesPerTurn : 4;
  return ahead < least ? least : ahead > kKeysPerDecodeBlock ? kKeysPerDecodeBlock : ahead;
}

// The row of each key of a chunk, [key - first key], and as many more as are fetched ahead, which
// repeat the last one.
inline void find_rows(const KeyRows& keys, int64_t kv_heads, int64_t first, int64_t end,
                      const char** pointers) {
  const char* row = nullptr;
  int64_t left_in_page = 0;
  for (int64_t key = first; key < end; ++key) {
    if (left_in_page == 0) {
      row = key_row(keys, key);
      left_in_page = keys.pages ? keys.page_size - key % keys.page_size : end - first;
    }
    *pointers++ = row;
    row += keys.rows.row_stride;
    --left_in_page;
  }
  const char* const last = pointers[-1];
  for (int64_t i = 0; i < keys_ahead(keys, kv_heads); ++i) *pointers++ = last;
}

// Fetches the rows of `count` keys, evenly spread over `steps` steps.
class FetchAhead {
 public:
  // `from` are the rows that are read in these steps.
  FetchAhead(const KeyRows& keys, int64_t kv_heads, const char* const* from, int64_t count,
             int64_t steps)
      : bytes_(bytes_of_key(keys, kv_heads)),
        next_(from + keys_ahead(keys, kv_heads)),
        keys_per_step_(keys_ahead(keys, kv_heads) > 0 ? count * kOne / steps : 0) {}

  void next(int steps) {
    due_ += steps * keys_per_step_;
    for (; due_ >= kOne; due_ -= kOne) {
      const char* const row = *next_++;
      int64_t i = 0;
      do {
        __builtin_prefetch(row + i, 0, 3);
        i += kCacheLine;
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

// Scratch for rows that cannot be read through the pointers of find_rows.
struct RowCopies {
  char* elements;     // of one block of K or V
  const char** rows;  // [key]
};

// Calls `use` with the rows of `count` keys of the head that lies `offset` bytes after the first
// one, and their type in memory. Elements with gaps are copied.
template <class Vectors, class Element, class Use>
void with_rows(const KeyRows& keys, const char* const* of_first_head, int64_t offset, int64_t count,
               const RowCopies& copies, Use use) {
  with_stored_type<Int8, Element>(keys.is_int8, [&]<class Type>(Stored<Type> type) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(Type));
    const int64_t stride = keys.rows.column_stride;
    if (stride == kSize && offset == 0) return use(of_first_head, type);
    char* to = copies.elements;
    if constexpr (!std::same_as<Type, Int8>) {
      if (is_transposed<Type>(keys)) {
        auto* const elements = reinterpret_cast<Type*>(to);
        copy_transposed<Vectors, Type>(of_first_head[0] + offset, stride, count, keys.dims,
                                       elements, keys.dims);
        for (int64_t i = 0; i < count; ++i) copies.rows[i] = to + i * keys.dims * kSize;
        const char* const* const moved = copies.rows;
        return use(moved, type);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      copies.rows[i] = stride == kSize ? of_first_head[i] + offset : to;
      for (int64_t d = 0; stride != kSize && d < keys.dims; ++d, to += kSize) {
        __builtin_memcpy(to, of_first_head[i] + offset + d * stride, static_cast<size_t>(kSize));
      }
    }
    const char* const* const moved = copies.rows;
    use(moved, type);
  });
}

}  // namespace
}  // namespace numattn
