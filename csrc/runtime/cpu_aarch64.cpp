// The 64-bit Arm part of cpu.h. It asks the operating system.
#if defined(__aarch64__)

#include "runtime/cpu.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace numattn {

bool cpu_has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, not in older headers
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t bytes = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &bytes, nullptr, 0) == 0 && has != 0;
#elif defined(_WIN32)
  constexpr DWORD kBf16 = 68;  // PF_ARM_V86_BF16_INSTRUCTIONS_AVAILABLE, not in older headers
  return IsProcessorFeaturePresent(kBf16) != 0;
#else
  return false;
#endif
}

}  // namespace numattn

#endif
