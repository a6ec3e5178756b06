#include "scratch.h"

#include <cstdlib>

namespace numattn {
namespace {

void* allocate(int64_t bytes) {
  return std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64));
}

struct Kept {
  void* data = nullptr;
  int64_t size = 0;
  bool in_use = false;
  ~Kept() { std::free(data); }
};

thread_local Kept kept;

}  // namespace

ThreadScratch::ThreadScratch(int64_t bytes) : is_kept_(!kept.in_use) {
  if (!is_kept_) {
    data_ = allocate(bytes);
    return;
  }
  kept.in_use = true;
  if (bytes > kept.size) {
    std::free(kept.data);
    kept.data = allocate(bytes);
    kept.size = kept.data ? bytes : 0;
  }
  data_ = kept.data;
}

ThreadScratch::~ThreadScratch() {
  if (is_kept_) {
    kept.in_use = false;
  } else {
    std::free(data_);
  }
}

}  // namespace numattn
