// Memory with a protected page directly before and after it, so that one byte read or written too
// far ends the program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

class GuardedMemory {
 public:
  // `at_end`: the last byte is followed by a protected page; else the first one is preceded by one.
  GuardedMemory(size_t bytes, bool at_end) : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    pages_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages_ == MAP_FAILED || mprotect(pages_, page, PROT_NONE) != 0 ||
        mprotect(pages_ + page + inside, page, PROT_NONE) != 0) {
      std::perror("guarded memory");
      std::abort();
    }
    data_ = pages_ + page + (at_end ? inside - bytes : 0);
  }
  ~GuardedMemory() { munmap(pages_, size_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* pages_;
  char* data_;
  size_t bytes_, size_;
};
