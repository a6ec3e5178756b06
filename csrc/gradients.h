// The contract of the backward pass: what the inputs of attention did to a loss, from what its
// results did to it.
//
// The caller has checked the arguments and allocates every array. Outputs overlap neither
// themselves nor an input; they hold zeros, or something to add to.
#pragma once

#include "problem.h"

namespace numattn {

struct GradientProblem {
  // As in the forward pass, without pages, 8-bit keys and values, and other stages. Its out and lse
  // are read.
  Problem forward;
  bool dout_is_float32 = false;  // beside 16 bits
  Array dout;                    // as out
  Array dlse;                    // as lse; data null: zeros
  // As q, k and v, of float64 where that is dtype, else float32; elements of a row have no gaps,
  // and rows are aligned to elements. What q, k and v broadcast has strides of its own.
  Array dq, dk, dv;
  // As bias, of dq's dtype: strides are 0 where queries, heads or batch items share a bias, or only
  // keys. Data null: not wanted.
  View dbias;
  int64_t dbias_batch_strides[kMaxBatchAxes];
};

// Adds to dq, dk, dv and dbias, in an order that the problem decides, whatever the threads.
Status attention_backward(const GradientProblem& problem, const Execution& execution);

}  // namespace numattn
