#include "runtime/thread_pool.h"

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "runtime/float_environment.h"
#include "runtime/scratch.h"
#include "runtime/service_class.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace numattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kInterruptPeriod = std::chrono::milliseconds(100);
// Long enough to bridge the gap between the calls of a Python loop, short enough not to show in the
// CPU load of an idle process.
constexpr auto kSpin = std::chrono::microseconds(60);

// How long a worker sleeps before it ends.
constexpr auto kIdle = std::chrono::seconds(5);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("isb");  // waits longer than `yield`, which most CPUs ignore
#else
  std::this_thread::yield();
#endif
}

// Spins until ready() is true or the spin time is over; returns the last ready().
template <class Ready>
bool spin_until(Ready ready) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < deadline);
  return ready();
}

// The number of forks between the process that loaded the library and this one. A child has none of
// its parent's helpers.
std::atomic<uint64_t> forks{0};

struct RunningJob {
  explicit RunningJob(const Job& job) : job(job) {}

  bool has_lost_its_helpers() const { return forks != forks_before; }

  const Job& job;
  const ServiceClass service_class{};  // the caller's
  const uint64_t forks_before = forks;
  std::atomic<int64_t> next_item{0};
  std::atomic<int64_t> items_done{0};
  std::atomic<bool> stop{false};
  std::atomic<int> helpers{0};  // changed under the pool's mutex
};

void work_on(RunningJob& running, bool (*interrupted)()) {
  const FloatEnvironment environment;
  const LargeScratchReleaser releaser;
  StopCheck stop(running.stop, interrupted);
  while (!stop.requested()) {
    const int64_t item = running.next_item.fetch_add(1, std::memory_order_relaxed);
    if (item >= running.job.items) return;
    if (!running.job.work(running.job.context, item, stop)) {
      running.stop.store(true, std::memory_order_relaxed);
      return;
    }
    running.items_done.fetch_add(1, std::memory_order_relaxed);
  }
}

class Pool {
 public:
  void run(RunningJob& running, int helpers_wanted) {
    const bool is_posted = post(running, helpers_wanted);
    work_on(running, running.job.interrupted);
    // A signal handler may have forked. Then the helpers' items are lost, and items_done shows it.
    if (!is_posted || running.has_lost_its_helpers()) return;
    {
      std::lock_guard lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &running));
    }
    wait_for_helpers(running);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // False if there is no memory to post it: then the calling thread has no helpers.
  bool post(RunningJob& running, int helpers_wanted) try {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(&running);
      start_workers(helpers_wanted);
      jobs_posted_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 0; i < helpers_wanted; ++i) work_ready_.notify_one();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }

  void start_workers(int wanted) {
#if !defined(_WIN32)
    // Workers block all signals: the application's own threads handle them.
    sigset_t all, before;
    sigfillset(&all);
    if (workers_ < wanted) pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool restore = workers_ < wanted;
#endif
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::exception&) {
      // No more threads can be started: the threads that exist do the work.
    }
#if !defined(_WIN32)
    if (restore) pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      const uint64_t seen = jobs_posted_.load(std::memory_order_relaxed);
      if (RunningJob* const running = job_with_room()) {
        running->helpers.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        running->service_class.give_to_this_thread();
        work_on(*running, nullptr);
        lock.lock();
        // The job may be gone after this.
        if (running->helpers.fetch_sub(1, std::memory_order_release) == 1)
          helper_left_.notify_all();
        continue;
      }
      lock.unlock();
      const auto posted = [&] { return jobs_posted_.load(std::memory_order_acquire) != seen; };
      const bool more = spin_until(posted);
      lock.lock();
      if (more || work_ready_.wait_for(lock, kIdle, posted)) continue;
      --workers_;
      return;
    }
  }

  RunningJob* job_with_room() {
    for (RunningJob* const running : jobs_) {
      if (running->next_item.load(std::memory_order_relaxed) < running->job.items &&
          running->helpers.load(std::memory_order_relaxed) + 1 < running->job.num_threads) {
        return running;
      }
    }
    return nullptr;
  }

  void wait_for_helpers(RunningJob& running) {
    const auto alone = [&] { return running.helpers.load(std::memory_order_acquire) == 0; };
    if (spin_until(alone)) {
      // The last helper may still hold the mutex. It may use the pool, but not the job.
      return;
    }
    StopCheck stop(running.stop, running.job.interrupted);
    std::unique_lock lock(mutex_);
    while (!helper_left_.wait_for(lock, kInterruptPeriod, alone)) {
      lock.unlock();
      stop.look();
      if (running.has_lost_its_helpers()) return;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_ready_, helper_left_;
  std::vector<RunningJob*> jobs_;  // that may still need helpers
  std::atomic<uint64_t> jobs_posted_{0};
  int workers_ = 0;
};

alignas(Pool) std::byte place_of_the_pool[sizeof(Pool)];

Pool* make_the_pool() { return new (place_of_the_pool) Pool; }

// Constructed when the library is loaded, so that no fork finds it half constructed. Never
// destroyed: workers may outlive the static objects of the process.
Pool& the_pool = *make_the_pool();

#if !defined(_WIN32)
// The child has no workers and no other callers, so it starts with a new pool.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { the_pool.mutex().lock(); }, [] { the_pool.mutex().unlock(); },
                   [] {
                     make_the_pool();
                     ++forks;
                   });
#endif

}  // namespace

// threadpoolctl looks for this name to tell the library with this pool from others with the same
// file name.
#if defined(_WIN32)
#define NUMATTN_VISIBLE __declspec(dllexport)
#else
#define NUMATTN_VISIBLE __attribute__((visibility("default")))
#endif
extern "C" NUMATTN_VISIBLE const int numattn_thread_pool = 1;

StopCheck::StopCheck(std::atomic<bool>& stop, bool (*interrupted)())
    : stop_(stop), interrupted_(interrupted), forks_before_(forks) {
  if (interrupted_) next_call_ = Clock::now() + kInterruptPeriod;
}

bool StopCheck::requested() {
  // Reading the clock takes as long as a small work item.
  constexpr unsigned kRequestsPerLook = 16;
  if (interrupted_ && ++requests_ % kRequestsPerLook == 0) return look();
  return stop_.load(std::memory_order_relaxed);
}

bool StopCheck::look() {
  if (stop_.load(std::memory_order_relaxed)) return true;
  if (!interrupted_) return false;
  const auto now = Clock::now();
  if (now < next_call_) return false;
  next_call_ = now + kInterruptPeriod;
  if (!interrupted_()) return false;
  stop_.store(true, std::memory_order_relaxed);
  return true;
}

bool StopCheck::is_in_a_fork() const { return forks != forks_before_; }

bool wait_for(const std::atomic<int64_t>& counter, int64_t value, StopCheck& stop) {
  const auto is_there = [&] { return counter.load(std::memory_order_acquire) == value; };
  while (!spin_until(is_there)) {
    if (stop.look() || stop.is_in_a_fork()) return false;
    std::this_thread::yield();
  }
  return true;
}

bool run(const Job& job) {
  RunningJob running(job);
  const int helpers = static_cast<int>(std::min<int64_t>(job.num_threads, job.items)) - 1;
  if (helpers > 0) {
    the_pool.run(running, helpers);
  } else {
    work_on(running, job.interrupted);
  }
  // An interrupt counts even if it was noticed only after all items were done.
  return !running.stop.load(std::memory_order_relaxed) &&
         running.items_done.load(std::memory_order_relaxed) == job.items;
}

}  // namespace numattn
