// Memory with a protected page before and after it, so that reading or writing too far ends the
// program.
#pragma once

#if defined(_WIN32)
#if !defined(NOMINMAX)
#define NOMINMAX  // otherwise windows.h defines macros named min and max
#endif
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdio>
#include <cstdlib>

// The parts that depend on the operating system.
namespace pages {

#if defined(_WIN32)
inline size_t size() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}
inline char* allocate(size_t bytes) {
  return static_cast<char*>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
}
inline bool protect(char* begin, size_t bytes) {
  DWORD before;
  return VirtualProtect(begin, bytes, PAGE_NOACCESS, &before) != 0;
}
inline void release(char* begin, size_t) { VirtualFree(begin, 0, MEM_RELEASE); }
#else
inline size_t size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
inline char* allocate(size_t bytes) {
  void* const begin =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return begin == MAP_FAILED ? nullptr : static_cast<char*>(begin);
}
inline bool protect(char* begin, size_t bytes) { return mprotect(begin, bytes, PROT_NONE) == 0; }
inline void release(char* begin, size_t bytes) { munmap(begin, bytes); }
#endif

}  // namespace pages

class GuardedMemory {
 public:
  // With `at_end`, a protected page directly follows the last byte; otherwise one directly precedes
  // the first byte.
  GuardedMemory(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = pages::size();
    const size_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    pages_ = pages::allocate(size_);
    if (!pages_ || !pages::protect(pages_, page) || !pages::protect(pages_ + page + inside, page)) {
      std::fputs("no guarded memory\n", stderr);
      std::abort();
    }
    data_ = pages_ + page + (at_end ? inside - bytes : 0);
  }
  ~GuardedMemory() { pages::release(pages_, size_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* pages_;
  char* data_;
  size_t bytes_, size_;
};
