// The threads: one pool for the process, shared by all callers.
//
// The calling thread always takes part, so that a call never waits for a worker to wake up.
// Workers spin for a moment after their work, sleep, and end when nothing came for some seconds.
// Work runs in one floating-point environment, whatever the callers'. A forked child starts with no
// workers and makes its own. OpenMP would do none of this: its threads hang in a forked child, and
// two of its run-time libraries in one process are a known crash.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace numattn {

// Whether to stop, as one thread of a job sees it. Cheap enough to be asked every microsecond.
class StopCheck {
 public:
  // `interrupted` is null for threads that may not call it.
  StopCheck(std::atomic<bool>& stop, bool (*interrupted)());
  bool requested();
  // Calls `interrupted` if it is time to.
  bool look();
  // Whether `interrupted` has forked and this is the child: what other threads began is lost.
  bool is_in_a_fork() const;

 private:
  std::atomic<bool>& stop_;
  bool (*interrupted_)();
  unsigned requests_ = 0;
  uint64_t forks_before_;
  std::chrono::steady_clock::time_point next_call_;
};

// StopCheck::requested for kernels, which take a function and its context.
inline bool stop_requested(void* stop) { return static_cast<StopCheck*>(stop)->requested(); }

struct Job {
  // Called once for each item in 0 ... items - 1, which start in increasing order. False means
  // that it was stopped or failed: no further item starts then.
  bool (*work)(void* context, int64_t item, StopCheck& stop);
  void* context;
  int64_t items;
  int num_threads;  // at most, the calling thread included
  // If not null, called by the calling thread about ten times a second, from StopCheck and while
  // it waits for the others. True stops the job.
  bool (*interrupted)();
};

// True if all items were done; false if the job was stopped or failed, or if `interrupted` forked
// and this is the child, which has no helpers. Any number of threads may call it at once. Where no
// thread can be had, or no memory for one, the caller does the work alone.
bool run(const Job& job);

// Waits until an item that started before has made the counter `value`. False if the job was
// stopped meanwhile, or the items before it are lost.
bool wait_for(const std::atomic<int64_t>& counter, int64_t value, StopCheck& stop);

}  // namespace numattn
