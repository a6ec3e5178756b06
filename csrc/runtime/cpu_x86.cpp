// The x86-64 part of cpu.h. It uses the instructions CPUID and XGETBV, because
// __builtin_cpu_supports needs a run-time library that not every compiler brings (clang-cl does
// not).
#if defined(__x86_64__)

#include <algorithm>
#include <cstdint>

#include "runtime/cpu.h"

// Included last: its macro __cpuid breaks a declaration with that name in Visual Studio's standard
// library.
#include <cpuid.h>

namespace numattn {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros if the CPU does not know the leaf.
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers found;
  __get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

constexpr uint64_t bits(auto... numbers) { return ((uint64_t{1} << numbers) | ...); }

constexpr bool has_all(uint64_t word, uint64_t wanted) { return (word & wanted) == wanted; }

// The registers that the operating system saves when it switches threads, as bits.
uint64_t saved_registers() {
  constexpr uint64_t kHasXgetbv = bits(27);  // OSXSAVE
  if (!has_all(cpuid(1).ecx, kHasXgetbv)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool saves_ymm() {
  constexpr uint64_t kXmmAndYmm = bits(1, 2);
  return has_all(saved_registers(), kXmmAndYmm);
}

bool saves_zmm() {
#if defined(__APPLE__)
  // macOS reports that it saves ZMM registers only after a thread has used them.
  return saves_ymm();
#else
  constexpr uint64_t kMasksAndZmm = bits(5, 6, 7);
  return saves_ymm() && has_all(saved_registers(), kMasksAndZmm);
#endif
}

}  // namespace

std::string cpu_name() {
  std::string name;
  for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
    const Registers words = cpuid(leaf);
    name.append(reinterpret_cast<const char*>(&words), sizeof(words));
  }
  name.erase(std::find(name.begin(), name.end(), '\0'), name.end());
  const auto first = name.find_first_not_of(' ');
  if (first == std::string::npos) return "x86-64";
  return name.substr(first, name.find_last_not_of(' ') + 1 - first);
}

bool cpu_has_avx2() {
  constexpr uint64_t kFmaAvxF16c = bits(12, 28, 29), kAvx2 = bits(5);
  return saves_ymm() && has_all(cpuid(1).ecx, kFmaAvxF16c) && has_all(cpuid(7).ebx, kAvx2);
}

bool cpu_has_avx512() {
  constexpr uint64_t kFDqBwVl = bits(16, 17, 30, 31);
  return cpu_has_avx2() && saves_zmm() && has_all(cpuid(7).ebx, kFDqBwVl);
}

bool cpu_has_avx512_bf16() {
  constexpr uint64_t kBf16 = bits(5);
  const bool has_subleaf = cpuid(7).eax >= 1;
  return cpu_has_avx512() && has_subleaf && has_all(cpuid(7, 1).eax, kBf16);
}

bool cpu_prefers_avx512_bf16() {
  constexpr unsigned kGenu = 0x756e6547, kIneI = 0x49656e69, kNtel = 0x6c65746e;
  const Registers vendor = cpuid(0);
  return vendor.ebx != kGenu || vendor.edx != kIneI || vendor.ecx != kNtel;
}

}  // namespace numattn

#endif
