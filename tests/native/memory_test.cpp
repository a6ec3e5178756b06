// Any allocation of a call may fail. Then the call either succeeds or returns out_of_memory, it
// leaves the thread's signal mask unchanged, and the next call is right. Threads that end keep no
// memory.
#if defined(_WIN32)
#include <malloc.h>
#else
#include <signal.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "gradient_problems.h"
#include "levels.h"
#include "problems.h"
#include "projection.h"
#include "row_operations.h"

namespace {

// The number of allocations before one fails; negative: none fails.
std::atomic<int64_t> allocations_left{-1};
// The number of allocations that are not freed yet.
std::atomic<int64_t> held{0};

void* allocate(size_t bytes, size_t alignment) {
  if (allocations_left >= 0 && allocations_left.fetch_sub(1) == 0) return nullptr;
#if defined(_WIN32)
  void* const result = _aligned_malloc(bytes, alignment);
#else
  void* result = nullptr;
  if (posix_memalign(&result, alignment, bytes) != 0) return nullptr;
#endif
  held += result != nullptr;
  return result;
}

void release(void* data) {
  held -= data != nullptr;
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

void* allocate_or_throw(size_t bytes, size_t alignment) {
  void* const result = allocate(bytes, alignment);
  if (!result) throw std::bad_alloc();
  return result;
}

constexpr size_t kSmallest = alignof(std::max_align_t);

}  // namespace

void* operator new(size_t bytes) { return allocate_or_throw(bytes, kSmallest); }
void* operator new[](size_t bytes) { return allocate_or_throw(bytes, kSmallest); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, kSmallest);
}
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { release(data); }
void operator delete[](void* data) noexcept { release(data); }
void operator delete(void* data, size_t) noexcept { release(data); }
void operator delete[](void* data, size_t) noexcept { release(data); }
void operator delete(void* data, std::align_val_t) noexcept { release(data); }

namespace {

int failures = 0;

void expect(bool is_so, const char* what, const std::string& where) {
  if (is_so) return;
  std::printf("%s:%s\n", what, where.c_str());
  ++failures;
}

bool signals_are_blocked() {
#if defined(_WIN32)
  return false;  // Windows does not send signals to threads
#else
  sigset_t blocked;
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  for (const int signal : {SIGINT, SIGTERM, SIGALRM}) {
    if (sigismember(&blocked, signal) == 1) return true;
  }
  return false;
#endif
}

// Calls `call` with the first allocation failing, then with the second, until none fails. Returns
// the number of calls that ran out of memory.
template <class Call>
int with_failing_allocations(const Call& call, const std::string& name) {
  int refused = 0;
  for (int64_t n = 0;; ++n) {
    allocations_left = n;
    const numattn::Status status = call();
    const bool all_worked = allocations_left.exchange(-1) >= 0;
    refused += status == numattn::Status::out_of_memory;
    expect(status != numattn::Status::interrupted, "interrupted", name);
    expect(!signals_are_blocked(), "signals are blocked", name);
    if (all_worked) {
      expect(status == numattn::Status::done, "not done, though nothing failed", name);
      return refused;
    }
  }
}

// A thread frees the memory that it keeps from call to call when it ends.
void expect_nothing_kept() {
  RandomProblem problem(1);
  problem.num_threads = 1;
  const auto compute = [&] { expect(problem.run() == numattn::Status::done, "not done", ""); };
  for (int round = 0; round < 20; ++round) {
    const int64_t before = held;
    std::thread(compute).join();
    // The first thread may have allocated memory that the process keeps.
    if (round > 0) expect(held == before, "a thread kept memory", "");
  }
}

}  // namespace

int main() {
  // Enough rows for several threads, none of which has been started yet.
  std::vector<float> numbers(1 << 20, 1.0f), out(numbers.size());
  numattn::RowSoftmax softmax;
  softmax.scores = reinterpret_cast<const char*>(numbers.data());
  softmax.out = reinterpret_cast<char*>(out.data());
  softmax.rows = softmax.columns = 1 << 10;
  with_failing_allocations([&] { return numattn::softmax(softmax, {3, nullptr}); }, " softmax");
  expect(out[0] == 1.0f / 1024 && out.back() == out[0], "wrong numbers", " softmax");

  int refused = 0;
  numattn::Product product;
  product.rows = product.depth = product.columns = 1 << 10;
  const auto row_bytes = static_cast<int64_t>(product.columns * sizeof(float));
  product.x =
      product.weight = {reinterpret_cast<char*>(numbers.data()), 0, row_bytes, sizeof(float)};
  product.out = product.x;
  product.out.data = reinterpret_cast<char*>(out.data());
  refused += with_failing_allocations(
      [&] { return numattn::multiply(numattn::Dtype::float32, &product, 1, {3, nullptr}); },
      " product");
  expect(out[0] == 1024 && out.back() == out[0], "wrong numbers", " product");

  const bool all_ran = on_every_level([&](const char*) {
    for (uint64_t seed = 1; seed <= 60; ++seed) {
      RandomProblem problem(seed);
      problem.num_threads = 3;
      refused += with_failing_allocations([&] { return problem.run(); }, problem.description);
      expect(problem.error_share() <= 1, "wrong numbers", problem.description);
    }
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      const RandomGradients problem(seed);
      expect(problem.run() == numattn::Status::done, "not done", problem.description);
      refused +=
          with_failing_allocations([&] { return problem.run_backward(3); }, problem.description);
      expect(problem.gradient_error_share() <= 1, "wrong gradients", problem.description);
    }
  });
  expect_nothing_kept();
  std::printf("%d calls were refused, %d failures\n", refused, failures);
  return all_ran && failures == 0 && refused > 60 ? 0 : 1;
}
