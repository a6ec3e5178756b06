// Products with matrices, as the layers of a model take them: out = x * weight + bias.
// The caller has checked the arguments and allocates every array.
#pragma once

#include <cstdint>

#include "kernels/task.h"
#include "problem.h"

namespace numattn {

// x (rows, depth), weight (depth, columns), bias (columns,) without gaps, or null, of one dtype;
// out (rows, columns) of that dtype or, beside 16 bits, of float32. Any strides in bytes, out's
// neither 0 nor such that elements overlap. No size is 0. 16-bit floats are multiplied in
// float32, or by pairs where a CPU has that for bfloat16, and rounded once at the end. out overlaps
// no other array of the call.
//
// A rotation turns the heads of each row before they are written; columns is a multiple of
// head_dim. Its cos and sin are float64 where x is, else float32.
struct Product {
  View x, weight, out;  // head_stride is not used
  const char* bias = nullptr;
  bool out_is_float32 = false;
  int64_t rows = 0, depth = 0, columns = 0;
  HeadRotation rotation = {};
};

// Computes several products at once: threads go from one to the next without waiting. The bits of a
// row do not depend on the other rows, on the other products or on the number of threads.
// `interrupted` as in Execution.
Status multiply(Dtype dtype, const Product* products, int64_t count, const Execution& execution);

}  // namespace numattn
