// Many callers at once, each with its own problems, get the same bits as when they run one at a
// time. This also holds while another thread pins the level in use, and if the caller rounds in
// another way. An interrupted call ends. Sleeping workers wake up for a job. Made for the thread
// sanitizer.
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "problems.h"
#include "runtime/dispatch.h"
#include "runtime/float_environment.h"
#include "runtime/thread_pool.h"

namespace {

// A problem with hours of work for each thread. All of its keys are the same one in memory.
bool ends_when_interrupted(int num_threads) {
  const std::vector<float> row(64 * 64, 1.0f);
  constexpr int64_t kHeads = 4;  // a work item for each thread
  std::vector<float> out(kHeads * row.size());
  numattn::Problem problem;
  problem.query_length = problem.head_dim = problem.value_dim = 64;
  problem.key_length = int64_t{1} << 40;
  problem.q.data = const_cast<char*>(reinterpret_cast<const char*>(row.data()));
  problem.q.row_stride = 64 * sizeof(float);
  problem.q.column_stride = sizeof(float);
  problem.k = problem.v = problem.out = problem.q;
  problem.k.row_stride = problem.v.row_stride = 0;
  problem.out.data = reinterpret_cast<char*>(out.data());
  problem.out.head_stride = 64 * problem.out.row_stride;
  problem.query_heads = problem.kv_heads = kHeads;
  static std::atomic<int> asked;
  asked = 0;
  const auto interrupted = [] { return ++asked == 2; };
  return numattn::attention(problem, {num_threads, interrupted}) == numattn::Status::interrupted &&
         asked == 2;
}

// With any rounding mode of the caller, the bits are the same on all threads, and the caller's mode
// is restored.
bool rounds_alike() {
  bool alike = true;
  std::thread([&] {
    RandomProblem problem(7);
    problem.num_threads = 1;
    bool done = problem.run() == numattn::Status::done;
    const std::vector<char> expected = problem.result();
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    constexpr unsigned kFlushSubnormal = 0x8040;
    _mm_setcsr(_mm_getcsr() | kFlushSubnormal);
    const unsigned before = _mm_getcsr();
#elif defined(__aarch64__)
    constexpr uint64_t kFlushSubnormal = 1 << 24;
    uint64_t settings;
    __asm__ volatile("mrs %0, fpcr" : "=r"(settings));
    __asm__ volatile("msr fpcr, %0" ::"r"(settings | kFlushSubnormal));
#endif
    for (int num_threads = 1; num_threads <= 4; ++num_threads) {
      problem.num_threads = num_threads;
      done = done && problem.run() == numattn::Status::done && problem.result() == expected;
    }
    alike = done && std::fegetround() == FE_UPWARD;
#if defined(__x86_64__)
    alike = alike && _mm_getcsr() == before;
#elif defined(__aarch64__)
    uint64_t after;
    __asm__ volatile("mrs %0, fpcr" : "=r"(after));
    alike = alike && after == (settings | kFlushSubnormal);
#endif
  }).join();
  return alike;
}

// Floating-point exceptions in the work do not set flags of the calling thread.
bool keeps_flags() {
  std::feclearexcept(FE_ALL_EXCEPT);
  std::feraiseexcept(FE_OVERFLOW);
  const int flags = std::fetestexcept(FE_ALL_EXCEPT);
  {
    const numattn::FloatEnvironment environment;
    volatile float quotient = 0.0f;
    quotient = 1.0f / quotient;
  }
  const bool kept = std::fetestexcept(FE_ALL_EXCEPT) == flags;
  std::feclearexcept(FE_ALL_EXCEPT);
  return kept;
}

// The work items wait for each other, so they are all done only if num_threads threads take part. A
// worker that missed its wake-up would also wake up after its five seconds of sleep, which is too
// late.
bool all_threads_meet(int num_threads) {
  struct Meeting {
    const int64_t wanted;
    std::atomic<int64_t> there{0};
  } meeting{num_threads};
  const auto meet = [](void* context, int64_t, numattn::StopCheck&) {
    auto& meeting = *static_cast<Meeting*>(context);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    ++meeting.there;
    while (meeting.there < meeting.wanted) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  };
  return numattn::run({meet, &meeting, num_threads, num_threads, nullptr});
}

// Tests pauses of several lengths between two jobs, so that workers are about to spin, spin, fall
// asleep or sleep.
bool workers_wake_up() {
  for (int num_threads = 2; num_threads <= 4; ++num_threads) {
    for (int microseconds = 0; microseconds <= 200; microseconds += 2) {
      std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
      if (!all_threads_meet(num_threads)) return false;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (!all_threads_meet(num_threads)) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 20;
  constexpr int kCallers = 8;
  constexpr uint64_t kProblems = 6;  // for each caller
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (uint64_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (uint64_t number = 0; number < kProblems; ++number) {
        RandomProblem problem(1000 + caller * kProblems + number);
        problem.num_threads = 1;
        if (problem.run() != numattn::Status::done) ++failures;
        const std::vector<char> expected = problem.result();
        for (int round = 0; round < rounds; ++round) {
          problem.num_threads = 1 + round % 4;
          if (problem.run() != numattn::Status::done || problem.result() != expected) ++failures;
        }
      }
    });
  }
  std::thread pinning([&] {
    const std::string isa = numattn::active_level().name;
    for (int i = 0; i < 1000; ++i) {
      if (!numattn::set_isa(isa).empty()) ++failures;
      std::this_thread::yield();
    }
  });
  for (std::thread& caller : callers) caller.join();
  pinning.join();
  for (const int num_threads : {1, 3}) failures += !ends_when_interrupted(num_threads);
  failures += !rounds_alike();
  failures += !keeps_flags();
  std::printf("%d callers, %d wrong\n", kCallers, failures.load());
  if (!workers_wake_up()) {
    std::puts("a worker slept through a job");
    ++failures;
  }
  return failures == 0 ? 0 : 1;
}
