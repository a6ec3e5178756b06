// What this CPU can do. Only cpu.cpp, cpu_x86.cpp and cpu_aarch64.cpp ask the hardware.
#pragma once

#include <string>

namespace numattn {

// As named by the vendor, or the architecture where that is not known.
std::string cpu_name();

// For each ISA level, whether the CPU has the instructions that its kernels are compiled for, and
// the operating system saves the registers.
inline bool cpu_has_generic() { return true; }
bool cpu_has_avx2();                         // AVX2, FMA, F16C
bool cpu_has_avx512();                       // F, BW, DQ, VL
bool cpu_has_avx512_bf16();                  // and BF16
inline bool cpu_has_neon() { return true; }  // of all 64-bit Arm CPUs
bool cpu_has_neon_bf16();                    // BF16

}  // namespace numattn
