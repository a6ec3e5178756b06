// Which kernels run: the only file that knows all ISA levels. The choice is made once, outside
// of all loops.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace numattn {

struct IsaLevel {
  const KernelTable* kernels;
  bool available;  // on this CPU
};

// All levels that were built, the least demanding first.
const std::vector<IsaLevel>& isa_levels();

// The kernels in use: the best level available, until set_isa says otherwise.
const KernelTable& active_kernels();

// Pins a level by name. Returns an empty string, or what is wrong with the name.
std::string set_isa(const std::string& name);

}  // namespace numattn
