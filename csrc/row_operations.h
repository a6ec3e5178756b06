// Operations on rows that go before or after attention: the softmax of rows, and rotary embedding.
// The caller has checked the arguments and allocates every array.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// out [row][key] = softmax of scores [row][key], both in C order and of `dtype`; mask [row][key]
// bytes in C order, 0 is masked, or null. A row without a key gets zeros. out may be scores.
struct RowSoftmax {
  Dtype dtype = Dtype::float32;
  const char* scores = nullptr;
  const uint8_t* mask = nullptr;
  char* out = nullptr;
  int64_t rows = 0, columns = 0;
};

// out = x with its pairs of elements rotated, (batch..., heads, length, dim) of `dtype`, any
// strides in bytes; out may be x itself. cos and sin (batch..., 1 head, length, rotary_dim / 2) of
// float64 where that is dtype, else float32, their columns without gaps; batch strides of 0
// broadcast. Elements from rotary_dim on are copied.
struct Rotation {
  Dtype dtype = Dtype::float32;
  int batch_axes = 0;
  int64_t batch_shape[kMaxBatchAxes];  // the first batch_axes are set
  int64_t heads = 1, length = 0, dim = 0, rotary_dim = 0;
  bool interleaved = false;  // pairs are neighbours, else half of rotary_dim apart
  Array x, out, cos, sin;
};

// `interrupted` as in Execution.
Status softmax(const RowSoftmax& problem, const Execution& execution);
Status rotate(const Rotation& problem, const Execution& execution);

}  // namespace numattn
