// Tests every ISA level that this CPU has.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/dispatch.h"

// Pins each level and calls `test` with its name. Returns false if the pinned level is not the
// level that runs, or if the default level is not the one in NUMATTN_TEST_BEST.
template <class Test>
bool on_every_level(const Test& test) {
  const char* const best = std::getenv("NUMATTN_TEST_BEST");
  if (best && best != std::string(numattn::active_level().name)) {
    std::printf("%s is the default level here, expected %s\n", numattn::active_level().name, best);
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
