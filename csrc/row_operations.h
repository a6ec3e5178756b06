// Operations on rows that a model needs before and after attention: the softmax of rows, rotary
// embedding, activations and norms. The caller has checked the arguments and allocates every array.
// Arrays are in C order, without gaps, unless they have strides. An output overlaps no other array,
// except that it may be one of the inputs that its comment names.
#pragma once

#include <cstdint>

#include "problem.h"

namespace numattn {

// out [row][key] = softmax of scores [row][key], both of `dtype`. mask [row][key] is bytes, 0 for a
// masked key, or null. A row whose keys are all masked gets zeros. out may be scores.
struct RowSoftmax {
  Dtype dtype = Dtype::float32;
  const char* scores = nullptr;
  const uint8_t* mask = nullptr;
  char* out = nullptr;
  int64_t rows = 0, columns = 0;
};

// out = x with its pairs of elements rotated. Elements from rotary_dim on are copied. x and out are
// (batch..., heads, length, dim) of `dtype`, with any strides in bytes; out may be x itself. cos
// and sin are (batch..., 1 head, length, rotary_dim / 2), float64 if dtype is float64, else
// float32. Their elements are aligned, and their columns have no gaps; batch strides of 0 broadcast
// them.
struct Rotation {
  Dtype dtype = Dtype::float32;
  int batch_axes = 0;
  int64_t batch_shape[kMaxBatchAxes];  // the first batch_axes are set
  int64_t heads = 1, length = 0, dim = 0, rotary_dim = 0;
  bool interleaved = false;  // pairs are neighbours; otherwise they are rotary_dim / 2 apart
  Array x, out, cos, sin;
};

// out = f(a) * times, element by element. times may be null, which means 1. out may be a.
enum class ActivationFunction : uint8_t { gelu, gelu_tanh, silu, relu, relu_squared };
struct Activation {
  Dtype dtype = Dtype::float32;
  ActivationFunction function = ActivationFunction::gelu;
  const char* a = nullptr;
  const char* times = nullptr;
  char* out = nullptr;
  int64_t elements = 0;
};

// Computes out too. From d, the gradient with respect to out, it computes d_a = d * times * f'(a)
// and d_times = d * f(a). d_times is null if times is. d_a or d_times may be d.
struct ActivationGradient : Activation {
  const char* d = nullptr;
  char* d_a = nullptr;
  char* d_times = nullptr;
};

// Norms of rows: unit = (x - mean) / root(mean((x - mean)^2) + epsilon), where mean is 0 unless
// is_centred. weight [column].
struct Norm {
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, columns = 0;
  double epsilon = 0;
  bool is_centred = false;
  const char* weight = nullptr;
};

// x += add, unless add is null; then out = unit * weight + bias. bias is [column], or null. out may
// be x.
struct Normalization : Norm {
  char* x = nullptr;
  const char* add = nullptr;
  const char* bias = nullptr;
  char* out = nullptr;
};

// Turns d, the gradient with respect to out, into the gradient with respect to x, in place. The
// gradients of weight and bias are the sums of weight_parts and bias_parts over the parts. Both are
// [part][column] with norm_gradient_parts(rows, columns) parts, float64 if dtype is float64, else
// float32. The caller fills them with 0 before the call. bias_parts may be null.
struct NormalizationGradient : Norm {
  const char* x = nullptr;
  char* d = nullptr;
  char* weight_parts = nullptr;
  char* bias_parts = nullptr;
};
int64_t norm_gradient_parts(int64_t rows, int64_t columns);

// `execution.interrupted` works as for attention.
Status softmax(const RowSoftmax& problem, const Execution& execution);
Status rotate(const Rotation& problem, const Execution& execution);
Status activate(const Activation& problem, const Execution& execution);
Status activate_back(const ActivationGradient& problem, const Execution& execution);
Status normalize(const Normalization& problem, const Execution& execution);
Status normalize_back(const NormalizationGradient& problem, const Execution& execution);

}  // namespace numattn
