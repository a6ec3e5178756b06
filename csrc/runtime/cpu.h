// What this CPU can do. Only cpu.cpp and, for x86-64, cpu_x86.cpp ask the hardware.
#pragma once

#include <string>

namespace numattn {

// As named by the vendor, or the architecture where that is not known.
std::string cpu_name();

// For each ISA level, whether the CPU has the instructions that its kernels are compiled for, and
// the operating system saves the registers.
inline bool cpu_has_generic() { return true; }
bool cpu_has_avx2();         // AVX2, FMA, F16C
bool cpu_has_avx512();       // F, BW, DQ, VL
bool cpu_has_avx512_bf16();  // and BF16

}  // namespace numattn
