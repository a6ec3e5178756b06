// What this CPU can do. Only cpu.cpp, cpu_x86.cpp and cpu_aarch64.cpp ask the hardware.
#pragma once

#include <string>

namespace numattn {

// The vendor's name for the CPU; if it is not known, the architecture.
std::string cpu_name();

// For each ISA level: whether the CPU has the instructions that the level's kernels are compiled
// for, and the operating system saves their registers.
inline bool cpu_has_generic() { return true; }
bool cpu_has_avx2();                         // AVX2, FMA, F16C
bool cpu_has_avx512();                       // F, BW, DQ, VL
bool cpu_has_avx512_bf16();                  // and BF16
inline bool cpu_has_neon() { return true; }  // all 64-bit Arm CPUs have it
bool cpu_has_neon_bf16();                    // BF16

// For each ISA level that the CPU has: whether it is faster than the level before it.
inline bool cpu_prefers_generic() { return true; }
inline bool cpu_prefers_avx2() { return true; }
inline bool cpu_prefers_avx512() { return true; }
// Not on Intel's CPUs. They start a product of bfloat16 pairs every second cycle: on a Sapphire
// Rapids, prompts in bfloat16 take 1.6 to 1.7 times as long as with avx512, which widens them.
bool cpu_prefers_avx512_bf16();
inline bool cpu_prefers_neon() { return true; }
inline bool cpu_prefers_neon_bf16() { return true; }

}  // namespace numattn
