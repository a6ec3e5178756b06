// What tests and benchmarks ask of an ISA level; no computation uses it.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// A probe is null if it is the same as in the previous level: the dispatch fills it in.
struct Probes {
  // For each dtype: multiply-adds, as fast as the level allows. Returns the flops done.
  double (*multiply_adds[kDtypes])(int64_t rounds);
  // The sum of `count` floats, a multiple of 64, read as fast as memory delivers them.
  float (*read_floats)(const float* from, int64_t count);
  // y[i] = 2^x[i], with the kernels' exp2.
  void (*exp2_float32)(const float* x, float* y, int64_t count);
  void (*exp2_float64)(const double* x, double* y, int64_t count);
};

}  // namespace numattn
