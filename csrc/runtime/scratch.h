// Memory that a thread keeps from call to call, so that no call pays for fresh pages. What is more
// than most calls need is given back when the thread's part of a job is done.
#pragma once

#include <cstdint>

namespace numattn {

// Scratch of the calling thread for as long as the object lives. A thread that asks while it
// holds some (a signal handler that computes during a computation) gets other memory.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes);
  ~ThreadScratch();
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;

  // Aligned to 64 bytes; null if the memory cannot be had.
  void* data() const { return data_; }

 private:
  void* data_;
  bool is_kept_;
};

// At its end, gives back what the calling thread keeps, if it is more than most calls need.
struct LargeScratchReleaser {
  LargeScratchReleaser() = default;
  ~LargeScratchReleaser();
  LargeScratchReleaser(const LargeScratchReleaser&) = delete;
  LargeScratchReleaser& operator=(const LargeScratchReleaser&) = delete;
};

}  // namespace numattn
