// The threads: one pool for the process, shared by all callers.
//
// The calling thread always takes part, so that a call never waits for a worker to wake up. After
// its work, a worker spins for a moment, then sleeps. It ends if no work comes for a few seconds.
// Work runs in one floating-point environment, whatever the caller's is. A forked child starts
// without workers and makes its own. OpenMP does none of this: its threads hang in a forked child,
// and a process that loads two OpenMP run-time libraries is known to crash.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace numattn {

// Tells one thread of a job whether to stop. Cheap enough to be asked every microsecond.
class StopCheck {
 public:
  // `interrupted` is null for threads that may not call it.
  StopCheck(std::atomic<bool>& stop, bool (*interrupted)());
  bool requested();
  // Also calls `interrupted`, if it is time to.
  bool look();
  // Whether `interrupted` has forked and this is the child: the other threads' work is lost.
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
  // Called once for each item in 0 ... items - 1; items start in increasing order. False means that
  // the item was stopped or failed: then no further item starts.
  bool (*work)(void* context, int64_t item, StopCheck& stop);
  void* context;
  int64_t items;
  int num_threads;  // at most, the calling thread included
  // If not null, the calling thread calls it about ten times a second, from StopCheck and while it
  // waits for the other threads. True stops the job.
  bool (*interrupted)();
};

// Returns true if all items were done. Returns false if the job was stopped or failed, or if
// `interrupted` forked and this is the child, which has no helpers. Any number of threads may call
// run at once. If no thread can be started, the caller does all the work itself.
bool run(const Job& job);

// Waits until an item that started earlier has set the counter to `value`. Returns false if the job
// was stopped in the meantime or the earlier items are lost.
bool wait_for(const std::atomic<int64_t>& counter, int64_t value, StopCheck& stop);

}  // namespace numattn
