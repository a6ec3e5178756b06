#include "runtime/scratch.h"

#include <new>

#if defined(_WIN32)
#if !defined(NOMINMAX)
#define NOMINMAX  // otherwise windows.h defines macros named min and max
#endif
#include <windows.h>
#endif

namespace numattn {
namespace {

constexpr std::align_val_t kCacheLine{64};
// With 256 elements per row, a block of query tiles needs 3 MB.
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

// The memory that the calling thread keeps until it ends; null if there is no memory for the
// record of it.
#if defined(_WIN32)
// Not a thread_local object: GCC for Windows frees the memory of those before it destroys them.
const DWORD slot = FlsAlloc([](void* kept) { delete static_cast<Kept*>(kept); });

Kept* find_kept() {
  if (void* const kept = FlsGetValue(slot)) return static_cast<Kept*>(kept);
  Kept* const kept = new (std::nothrow) Kept;
  if (kept && FlsSetValue(slot, kept)) return kept;
  delete kept;
  return nullptr;
}
#else
Kept* find_kept() {
  thread_local Kept kept;
  return &kept;
}
#endif

}  // namespace

ThreadScratch::ThreadScratch(int64_t bytes) {
  Kept* const kept = find_kept();
  is_kept_ = kept && !kept->in_use;
  if (!is_kept_) {
    data_ = allocate(bytes);
    return;
  }
  kept->in_use = true;
  if (bytes > kept->size) {
    release(kept->data);
    kept->data = allocate(bytes);
    kept->size = kept->data ? bytes : 0;
  }
  data_ = kept->data;
}

ThreadScratch::~ThreadScratch() {
  if (is_kept_) {
    find_kept()->in_use = false;
  } else {
    release(data_);
  }
}

LargeScratchReleaser::~LargeScratchReleaser() {
  Kept* const kept = find_kept();
  if (!kept || kept->in_use || kept->size <= kMostKept) return;
  release(kept->data);
  kept->data = nullptr;
  kept->size = 0;
}

}  // namespace numattn
