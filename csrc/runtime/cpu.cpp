#include "runtime/cpu.h"

#if !defined(__x86_64__)

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace numattn {

std::string cpu_name() {
#if defined(__APPLE__)
  char name[256];
  size_t bytes = sizeof(name);
  if (sysctlbyname("machdep.cpu.brand_string", name, &bytes, nullptr, 0) == 0) return name;
#endif
#if defined(__aarch64__)
  return "arm64";
#else
  return "unknown";
#endif
}

}  // namespace numattn

#endif
