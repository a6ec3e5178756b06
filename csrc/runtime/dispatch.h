// Chooses which kernels run. The choice is made once, outside all loops.
#pragma once

#include <string>
#include <vector>

#include "kernels/probes.h"
#include "kernels/table.h"

namespace numattn {

struct IsaLevel {
  const char* name;
  KernelTable kernels;
  Probes probes;
  bool available;  // on this CPU
  bool preferred;  // faster on this CPU than the level before it, if it is available
};

// All levels in this build, each better than the level before it.
const std::vector<IsaLevel>& isa_levels();

// The level in use: the fastest available level, unless set_isa has pinned another.
const IsaLevel& active_level();

// Pins a level by name. Returns an empty string, or what is wrong with the name.
std::string set_isa(const std::string& name);

}  // namespace numattn
