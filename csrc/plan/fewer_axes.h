// The same problem with as few batch axes as its strides allow.
#pragma once

#include "problem.h"

namespace numattn {

// Two neighbouring batch axes become one if every array can walk through both with one stride. The
// last batch axis becomes part of the heads on the same condition, if only arrays depend on batch
// item or head. Heads are then found by one stride, and a work item may take heads of several batch
// items.
Problem with_fewer_axes(const Problem& problem);

}  // namespace numattn
