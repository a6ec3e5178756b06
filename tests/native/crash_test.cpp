// Reads a protected page in a new thread. Wine must report that the program failed: otherwise no
// test that runs under Wine could fail this way.
#include <thread>

#include "guarded_memory.h"

int main() {
  const GuardedMemory memory(1, true);
  std::thread([&] { static_cast<void>(*static_cast<volatile char*>(memory.data() + 1)); }).join();
  return 0;
}
