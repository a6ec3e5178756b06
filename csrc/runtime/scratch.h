// Memory that a thread keeps from call to call, so that calls do not pay for fresh pages. If it is
// larger than most calls need, it is freed when the thread's part of a job is done.
#pragma once

#include <cstdint>

namespace numattn {

// Scratch of the calling thread while the object exists. If the thread already holds scratch (a
// signal handler that computes during a computation), it gets other memory.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes);
  ~ThreadScratch();
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;

  // Aligned to 64 bytes; null if there is no memory.
  void* data() const { return data_; }

 private:
  void* data_;
  bool is_kept_;
};

// Its destructor frees the memory that the calling thread keeps if that is more than most calls
// need.
struct LargeScratchReleaser {
  LargeScratchReleaser() = default;
  ~LargeScratchReleaser();
  LargeScratchReleaser(const LargeScratchReleaser&) = delete;
  LargeScratchReleaser& operator=(const LargeScratchReleaser&) = delete;
};

}  // namespace numattn
