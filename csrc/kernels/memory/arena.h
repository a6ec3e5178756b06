// How a kernel divides its scratch memory.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// Hands out consecutive pieces, each aligned to 64 bytes, or only counts their bytes if `base` is
// null.
struct Arena {
  char* base;
  int64_t used;

  template <class T>
  void take(T*& piece, int64_t count) {
    piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

}  // namespace
}  // namespace numattn
