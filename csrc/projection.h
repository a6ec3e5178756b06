// Matrix products as in the linear layers of a model: out = x * weight + bias.
// The caller has checked the arguments and allocates every array.
#pragma once

#include <cstdint>

#include "kernels/task.h"
#include "problem.h"

namespace numattn {

// Shapes: x (rows, depth), weight (depth, columns), bias (columns,) or null, out (rows, columns).
// No size is 0. All have one dtype, but with 16-bit inputs out may be float32. Strides are in bytes
// and may have any value, except that the elements of out do not overlap; bias has no gaps. out
// overlaps no other array of the call.
//
// 16-bit floats are multiplied in float32, or in pairs if a CPU has such products for bfloat16, and
// rounded once at the end.
//
// A rotation turns the heads of each row before they are written. columns is then a multiple of
// head_dim. cos and sin are float64 if x is, else float32, without gaps and aligned to their
// elements.
struct Product {
  View x, weight, out;  // head_stride is not used
  const char* bias = nullptr;
  bool out_is_float32 = false;
  int64_t rows = 0, depth = 0, columns = 0;
  HeadRotation rotation = {};
};

// Computes several products at once: threads go from one to the next without waiting. The bits of a
// row do not depend on the other rows, on the other products or on the number of threads.
// `execution.interrupted` works as for attention.
Status multiply(Dtype dtype, const Product* products, int64_t count, const Execution& execution);

}  // namespace numattn
