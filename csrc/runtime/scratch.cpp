#include "runtime/scratch.h"

#include <new>

namespace numattn {
namespace {

constexpr std::align_val_t kCacheLine{64};
// A block of query tiles with vectors of 256 elements needs 3 MB.
constexpr int64_t kMostKept = int64_t{8} << 20;

void* allocate(int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), kCacheLine, std::nothrow);
}

void release(void* data) { ::operator delete(data, kCacheLine); }

struct Kept {
  void* data = nullptr;
  int64_t size = 0;
  bool in_use = false;
  ~Kept() { release(data); }
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
    release(kept.data);
    kept.data = allocate(bytes);
    kept.size = kept.data ? bytes : 0;
  }
  data_ = kept.data;
}

ThreadScratch::~ThreadScratch() {
  if (is_kept_) {
    kept.in_use = false;
  } else {
    release(data_);
  }
}

LargeScratchReleaser::~LargeScratchReleaser() {
  if (kept.in_use || kept.size <= kMostKept) return;
  release(kept.data);
  kept.data = nullptr;
  kept.size = 0;
}

}  // namespace numattn
