#include "runtime/dispatch.h"

#include <atomic>

#include "runtime/cpu.h"

namespace numattn {

// CMake generates levels.inc from the list of levels: NUMATTN_LEVEL(name) for each level that is
// built.
#define NUMATTN_LEVEL(level)                \
  extern const KernelTable kernels_##level; \
  extern const Probes probes_##level;
#include "levels.inc"
#undef NUMATTN_LEVEL

namespace {

// Fills in the kernels and probes that a level takes from the level before it.
void inherit(IsaLevel& level, const IsaLevel& before) {
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    if (level.kernels.dtypes[dtype].prefill) continue;
    level.kernels.dtypes[dtype] = before.kernels.dtypes[dtype];
    level.probes.multiply_adds[dtype] = before.probes.multiply_adds[dtype];
  }
  if (level.probes.exp2_float32) return;
  level.probes.read_floats = before.probes.read_floats;
  level.probes.exp2_float32 = before.probes.exp2_float32;
  level.probes.exp2_float64 = before.probes.exp2_float64;
}

}  // namespace

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = [] {
    std::vector<IsaLevel> all = {
#define NUMATTN_LEVEL(level) \
  {#level, kernels_##level, probes_##level, cpu_has_##level(), cpu_prefers_##level()},
#include "levels.inc"
#undef NUMATTN_LEVEL
    };
    for (size_t i = 1; i < all.size(); ++i) inherit(all[i], all[i - 1]);
    return all;
  }();
  return levels;
}

namespace {

const IsaLevel* fastest_available() {
  const IsaLevel* fastest = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    if (level.available && level.preferred) fastest = &level;
  }
  return fastest;
}

// Chosen when the library is loaded, so that no fork finds it half initialised.
std::atomic<const IsaLevel*> active{fastest_available()};

}  // namespace

const IsaLevel& active_level() { return *active.load(std::memory_order_relaxed); }

std::string set_isa(const std::string& name) {
  std::string built;
  for (const IsaLevel& level : isa_levels()) {
    if (name == level.name) {
      if (!level.available) {
        return "this CPU (" + cpu_name() + ") does not have the instructions of '" + name + "'";
      }
      active.store(&level, std::memory_order_relaxed);
      return "";
    }
    built += std::string(built.empty() ? "" : ", ") + level.name;
  }
  return "'" + name + "' is not among the levels of this build: " + built;
}

}  // namespace numattn
