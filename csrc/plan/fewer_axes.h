// The same problem with as few batch axes as its strides allow.
#pragma once

#include "problem.h"

namespace numattn {

// Neighbouring batch axes become one where every array walks through both with one stride, and the
// last one becomes part of the heads where nothing but the arrays depends on either. Heads are then
// found by one stride, and a work item may take heads of several batch items.
Problem with_fewer_axes(const Problem& problem);

}  // namespace numattn
