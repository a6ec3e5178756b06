// Which kernels run. The choice is made once, outside of all loops.
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
};

// All levels that were built, each better than the one before it.
const std::vector<IsaLevel>& isa_levels();

// The level in use: the best one available, until set_isa says otherwise.
const IsaLevel& active_level();

// Pins a level by name. Returns an empty string, or what is wrong with the name.
std::string set_isa(const std::string& name);

}  // namespace numattn
