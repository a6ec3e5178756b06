#include "runtime/cpu.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define NUMATTN_X86_64 1
#include <cpuid.h>
#endif

namespace numattn {

#if NUMATTN_X86_64
std::string cpu_name() {
  std::string name;
  unsigned words[4];
  for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
    if (!__get_cpuid(leaf, &words[0], &words[1], &words[2], &words[3])) return "x86-64";
    name.append(reinterpret_cast<const char*>(words), sizeof(words));
  }
  name.erase(std::find(name.begin(), name.end(), '\0'), name.end());
  const auto first = name.find_first_not_of(' ');
  if (first == std::string::npos) return "x86-64";
  return name.substr(first, name.find_last_not_of(' ') + 1 - first);
}

// The compiler's run-time library asks CPUID and whether the operating system saves the registers.
// Older Clang knows no "f16c".
bool cpu_has_avx2() {
  unsigned eax, ebx, ecx, edx;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
std::string cpu_name() {
#if defined(__aarch64__)
  return "arm64";
#else
  return "unknown";
#endif
}
#endif

}  // namespace numattn
