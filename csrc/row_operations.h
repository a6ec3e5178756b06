// Operations on rows that go before or after attention: the softmax of rows, rotary embedding,
// activations and norms. The caller has checked the arguments and allocates every array.
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

// out = f(a) * times, element by element; times is null for 1. out may be a.
enum class ActivationFunction : uint8_t { gelu, gelu_tanh, silu, relu, relu_squared };
struct Activation {
  Dtype dtype = Dtype::float32;
  ActivationFunction function = ActivationFunction::gelu;
  const char* a = nullptr;
  const char* times = nullptr;
  char* out = nullptr;
  int64_t elements = 0;
};

// The same, and, from the gradient d with respect to out: d_a = d * times * f'(a) and
// d_times = d * f(a), which is null where times is. Both may be d.
struct ActivationGradient : Activation {
  const char* d = nullptr;
  char* d_a = nullptr;
  char* d_times = nullptr;
};

// Norms of rows in C order: unit = (x - mean) / root(mean((x - mean)^2) + epsilon), where mean is 0
// unless is_centred. weight [column].
struct Norm {
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, columns = 0;
  double epsilon = 0;
  bool is_centred = false;
  const char* weight = nullptr;
};

// out = unit * weight + bias. First x += add, unless that is null. bias [column], or null. out may
// be x.
struct Normalization : Norm {
  char* x = nullptr;
  const char* add = nullptr;
  const char* bias = nullptr;
  char* out = nullptr;
};

// Turns the gradient d with respect to out into the one with respect to x, in place. What the
// gradients of weight and bias are the sums of: parts [part][column] of float64 where that is
// dtype, else float32, norm_gradient_parts(rows, columns) of them, to be 0 before. bias_parts may
// be null.
struct NormalizationGradient : Norm {
  const char* x = nullptr;
  char* d = nullptr;
  char* weight_parts = nullptr;
  char* bias_parts = nullptr;
};
int64_t norm_gradient_parts(int64_t rows, int64_t columns);

// `interrupted` as in Execution.
Status softmax(const RowSoftmax& problem, const Execution& execution);
Status rotate(const Rotation& problem, const Execution& execution);
Status activate(const Activation& problem, const Execution& execution);
Status activate_back(const ActivationGradient& problem, const Execution& execution);
Status normalize(const Normalization& problem, const Execution& execution);
Status normalize_back(const NormalizationGradient& problem, const Execution& execution);

}  // namespace numattn
