#include "runtime/dispatch.h"

#include <atomic>

#include "runtime/cpu.h"

namespace numattn {

extern const KernelTable kernels_generic;
#if NUMATTN_HAVE_X86_KERNELS
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const DtypeKernels bfloat16_kernels_avx512_bf16;

namespace {

// Pairs of bfloat16 are all that this level adds.
const KernelTable& avx512_bf16() {
  static const KernelTable table = [] {
    KernelTable copy = kernels_avx512;
    copy.isa = "avx512_bf16";
    copy.dtypes[static_cast<int>(Dtype::bfloat16)] = bfloat16_kernels_avx512_bf16;
    return copy;
  }();
  return table;
}

}  // namespace
#endif

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = {
      {&kernels_generic, true},
#if NUMATTN_HAVE_X86_KERNELS
      {&kernels_avx2, cpu_has_avx2()},
      {&kernels_avx512, cpu_has_avx512()},
      {&avx512_bf16(), cpu_has_avx512_bf16()},
#endif
  };
  return levels;
}

namespace {

const KernelTable* best_available() {
  const KernelTable* best = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    if (level.available) best = level.kernels;
  }
  return best;
}

// Chosen as the library is loaded, so that no fork finds it half made.
std::atomic<const KernelTable*> active{best_available()};

}  // namespace

const KernelTable& active_kernels() { return *active.load(std::memory_order_relaxed); }

std::string set_isa(const std::string& name) {
  std::string built;
  for (const IsaLevel& level : isa_levels()) {
    if (name == level.kernels->isa) {
      if (!level.available) {
        return "this CPU (" + cpu_name() + ") does not have the instructions of '" + name + "'";
      }
      active.store(level.kernels, std::memory_order_relaxed);
      return "";
    }
    built += std::string(built.empty() ? "" : ", ") + level.kernels->isa;
  }
  return "'" + name + "' is not among the levels of this build: " + built;
}

}  // namespace numattn
