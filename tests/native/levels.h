// Every ISA level that this CPU has, one after the other.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/dispatch.h"

// Calls `test` with the name of each level, which is pinned meanwhile. False where the one that is
// pinned is not the one that runs, or the best one is not what NUMATTN_TEST_BEST says.
template <class Test>
bool on_every_level(const Test& test) {
  const char* const best = std::getenv("NUMATTN_TEST_BEST");
  if (best && best != std::string(numattn::active_level().name)) {
    std::printf("%s is the best level here, expected %s\n", numattn::active_level().name, best);
    return false;
  }
  for (const numattn::IsaLevel& level : numattn::isa_levels()) {
    const char* const isa = level.name;
    if (!level.available) {
      std::printf("%s: not on this CPU\n", isa);
      continue;
    }
    if (!numattn::set_isa(isa).empty() || &numattn::active_level() != &level) {
      std::printf("%s was pinned, but is not what runs\n", isa);
      return false;
    }
    test(isa);
  }
  return true;
}
