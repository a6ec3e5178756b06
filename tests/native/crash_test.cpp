// Reads a protected page in a thread of its own. Wine has to say that the program failed, or none
// of the tests that it runs could fail so.
#include <thread>

#include "guarded_memory.h"

int main() {
  const GuardedMemory memory(1, true);
  std::thread([&] { static_cast<void>(*static_cast<volatile char*>(memory.data() + 1)); }).join();
  return 0;
}
