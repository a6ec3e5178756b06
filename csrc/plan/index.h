// Index arithmetic that the plans share.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t count_batch_items(int axes, const int64_t* shape) {
  int64_t items = 1;
  for (int axis = 0; axis < axes; ++axis) items *= shape[axis];
  return items;
}

// The offset of a batch item in an array with these strides. Batch items are numbered in row-major
// order.
inline int64_t batch_offset(int axes, const int64_t* shape, const int64_t* strides,
                            int64_t batch_item) {
  int64_t offset = 0;
  for (int axis = axes - 1; axis >= 0; --axis) {
    offset += batch_item % shape[axis] * strides[axis];
    batch_item /= shape[axis];
  }
  return offset;
}

inline char* address(const View& view, int64_t head, int64_t row) {
  return view.data + head * view.head_stride + row * view.row_stride;
}

}  // namespace numattn
