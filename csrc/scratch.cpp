#include "scratch.h"

#include <cstdlib>

namespace numattn {
namespace {

struct Scratch {
  void* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.size) {
    std::free(scratch.data);
    const int64_t size = (bytes + 63) / 64 * 64;
    scratch.data = std::aligned_alloc(64, static_cast<std::size_t>(size));
    scratch.size = scratch.data ? size : 0;
  }
  return scratch.data;
}

}  // namespace numattn
