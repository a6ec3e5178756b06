// The contract of the backward pass: from the gradients of a loss with respect to the results of
// attention, it computes the gradients with respect to its inputs.
//
// The caller has checked the arguments and allocates every array. dq, dk, dv and dbias hold zeros,
// or values to add to. Their elements do not overlap each other or an input, except where dbias has
// strides of 0.
#pragma once

#include "problem.h"

namespace numattn {

struct GradientProblem {
  // The forward pass, which must be Stage::attention without pages and without 8-bit keys and
  // values. Its out and lse are inputs here.
  Problem forward;
  bool dout_is_float32 = false;  // only with a 16-bit dtype; otherwise dout has dtype
  Array dout;                    // shaped like out
  Array dlse;                    // like lse; data null: zeros
  // Shaped like q, k and v, with memory for every element even if q, k or v is broadcast.
  // They are float64 if dtype is float64, else float32. The elements of a row have no gaps, and
  // rows are aligned to their elements.
  Array dq, dk, dv;
  // Shaped like bias, of dq's dtype. Strides are 0 along batch axes, heads and queries that share a
  // bias. If the keys share it, only the stride along the keys is 0. Data null: not wanted.
  View dbias;
  int64_t dbias_batch_strides[kMaxBatchAxes];
};

// Adds to dq, dk, dv and dbias, in an order that depends only on the problem, not on the threads.
Status attention_backward(const GradientProblem& problem, const Execution& execution);

}  // namespace numattn
