// Many callers at once, each with problems of its own, give the bits of a run one by one; also
// while another thread pins levels. Made for the thread sanitizer.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "problems.h"

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 20;
  constexpr int kCallers = 8;
  constexpr uint64_t kProblems = 6;  // of each caller
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
    const std::string isa = numattn::active_kernels().isa;
    for (int i = 0; i < 1000; ++i) {
      if (!numattn::set_isa(isa).empty()) ++failures;
      std::this_thread::yield();
    }
  });
  for (std::thread& caller : callers) caller.join();
  pinning.join();
  std::printf("%d callers, %d wrong\n", kCallers, failures.load());
  return failures == 0 ? 0 : 1;
}
