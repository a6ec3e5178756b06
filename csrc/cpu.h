// What this CPU can do. The only file that asks the hardware.
#pragma once

#include <string>

namespace numattn {

// As named by the vendor, or the architecture where that is not known.
std::string cpu_name();

bool cpu_has_avx2_fma();
// F, BW, DQ and VL, with the operating system saving the registers.
bool cpu_has_avx512();

// CPUs that this process may run on: cgroup quotas are not counted.
int usable_cpus();

}  // namespace numattn
