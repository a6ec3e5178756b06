// Tests softmax of rows, rotary embedding, activations, norms and matrix products through their
// public headers: random problems on every ISA level, with arrays between protected pages, against
// the formula in double.
//
//   row_operations_test PROBLEMS
#include "row_operations.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "guarded_memory.h"
#include "levels.h"
#include "problems.h"
#include "projection.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(engine_); }
  bool sometimes(double probability) {
    return std::uniform_real_distribution<double>()(engine_) < probability;
  }
  double normal() { return std::normal_distribution<double>()(engine_); }
  Kind kind() {
    constexpr Kind kinds[] = {Kind::float32, Kind::float64, Kind::float16, Kind::bfloat16};
    return kinds[below(4)];
  }
  // Fills memory with `count` numbers and returns their values, rounded as stored.
  std::vector<double> fill(const GuardedMemory& memory, Kind kind, int64_t count) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
      char* const at = memory.data() + static_cast<size_t>(i) * size_of(kind);
      store(kind, at, normal());
      values.push_back(load(kind, at));
    }
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

double share_of_allowed(Kind kind, double actual, double expected, double size) {
  if (!std::isfinite(actual)) return kInfinity;
  return actual == expected ? 0 : std::abs(actual - expected) / (rounding(kind) * size);
}

// The largest error, divided by the allowed error.
double softmax_error(uint64_t seed) {
  Random random(seed);
  const Kind kind = random.kind();
  const int64_t rows = random.below(40), columns = random.sometimes(0.1) ? 3000 : random.below(140);
  const auto count = static_cast<size_t>(rows * columns);
  const bool at_end = random.sometimes(0.5), in_place = random.sometimes(0.3);
  const GuardedMemory scores(count * size_of(kind), at_end), other(count * size_of(kind), at_end);
  const GuardedMemory mask(count, at_end);
  const std::vector<double> values = random.fill(scores, kind, rows * columns);
  const bool masked = random.sometimes(0.5);
  for (size_t i = 0; i < count; ++i) mask.data()[i] = random.sometimes(0.7);

  numattn::RowSoftmax problem;
  problem.dtype = dtype_of(kind);
  problem.scores = scores.data();
  if (masked) problem.mask = reinterpret_cast<const uint8_t*>(mask.data());
  problem.out = in_place ? scores.data() : other.data();
  problem.rows = rows;
  problem.columns = columns;
  const int threads = 1 + static_cast<int>(random.below(3));
  if (numattn::softmax(problem, {threads, nullptr}) != numattn::Status::done) return kInfinity;

  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const auto weight = [&](int64_t j) {
      const auto at = static_cast<size_t>(i * columns + j);
      return masked && !mask.data()[at] ? 0 : std::exp(values[at]);
    };
    double sum = 0, largest_weight = 0;
    for (int64_t j = 0; j < columns; ++j) {
      sum += weight(j);
      largest_weight = std::max(largest_weight, weight(j));
    }
    for (int64_t j = 0; j < columns; ++j) {
      const auto at = static_cast<size_t>(i * columns + j) * size_of(kind);
      const double expected = sum == 0 ? 0 : weight(j) / sum;
      const double actual = load(kind, problem.out + at);
      const double size = sum == 0 ? 0 : largest_weight / sum;
      largest = std::max(largest, share_of_allowed(kind, actual, expected, size));
    }
  }
  return largest;
}

double rotation_error(uint64_t seed) {
  Random random(seed);
  const Kind kind = random.kind();
  const Kind precision = kind == Kind::float64 ? Kind::float64 : Kind::float32;
  const int64_t batch = 1 + random.below(3), heads = 1 + random.below(4);
  const int64_t length = 1 + random.below(70), dim = 2 + random.below(80);
  const int64_t pairs = 1 + random.below(dim / 2);
  const bool rows_first = random.sometimes(0.5), at_end = random.sometimes(0.5);
  const bool in_place = random.sometimes(0.3), same_angles = random.sometimes(0.5);
  const auto size = static_cast<int64_t>(size_of(kind));
  const int64_t angle_size = static_cast<int64_t>(size_of(precision));
  const int64_t angle_batch = same_angles ? 1 : batch;
  const auto bytes = static_cast<size_t>(batch * heads * length * dim * size);
  const auto angle_bytes = static_cast<size_t>(angle_batch * length * pairs * angle_size);
  const GuardedMemory x(bytes, at_end), other(bytes, at_end);
  const GuardedMemory cos(angle_bytes, at_end), sin(angle_bytes, at_end);
  const std::vector<double> values = random.fill(x, kind, batch * heads * length * dim);
  const std::vector<double> c = random.fill(cos, precision, angle_batch * length * pairs);
  const std::vector<double> s = random.fill(sin, precision, angle_batch * length * pairs);

  numattn::Rotation problem;
  problem.dtype = dtype_of(kind);
  problem.batch_axes = 1;
  problem.batch_shape[0] = batch;
  problem.heads = heads;
  problem.length = length;
  problem.dim = dim;
  problem.rotary_dim = 2 * pairs;
  problem.interleaved = random.sometimes(0.5);
  problem.x.data = x.data();
  problem.x.column_stride = size;
  problem.x.row_stride = dim * size * (rows_first ? heads : 1);
  problem.x.head_stride = dim * size * (rows_first ? 1 : length);
  problem.x.batch_strides[0] = heads * length * dim * size;
  problem.out = problem.x;
  problem.out.data = in_place ? x.data() : other.data();
  problem.cos.data = cos.data();
  problem.cos.column_stride = angle_size;
  problem.cos.row_stride = pairs * angle_size;
  problem.cos.batch_strides[0] = same_angles ? 0 : length * pairs * angle_size;
  problem.sin = problem.cos;
  problem.sin.data = sin.data();
  const int threads = 1 + static_cast<int>(random.below(3));
  if (numattn::rotate(problem, {threads, nullptr}) != numattn::Status::done) return kInfinity;

  double largest = 0;
  const auto compare = [&](int64_t at, double a, double b) {
    const double actual = load(kind, problem.out.data + at * size);
    largest = std::max(largest, share_of_allowed(kind, actual, a + b, std::abs(a) + std::abs(b)));
  };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < length; ++i) {
        const numattn::Array& array = problem.x;
        const int64_t row =
            (b * array.batch_strides[0] + h * array.head_stride + i * array.row_stride) / size;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int64_t first = row + (problem.interleaved ? 2 * pair : pair);
          const int64_t second = first + (problem.interleaved ? 1 : pairs);
          const auto angle =
              static_cast<size_t>(((same_angles ? 0 : b) * length + i) * pairs + pair);
          const double x1 = values[static_cast<size_t>(first)];
          const double x2 = values[static_cast<size_t>(second)];
          compare(first, x1 * c[angle], -x2 * s[angle]);
          compare(second, x2 * c[angle], x1 * s[angle]);
        }
        for (int64_t j = row + 2 * pairs; j < row + dim; ++j) {
          compare(j, values[static_cast<size_t>(j)], 0);
        }
      }
    }
  }
  return largest;
}

// The same for activations and their gradients.
double activation_error(uint64_t seed) {
  Random random(seed);
  const Kind kind = random.kind();
  const int64_t elements = random.sometimes(0.1) ? 70'000 : random.below(140);
  const auto bytes = static_cast<size_t>(elements) * size_of(kind);
  const bool at_end = random.sometimes(0.5), gated = random.sometimes(0.5);
  const GuardedMemory a(bytes, at_end), times(bytes, at_end), out(bytes, at_end);
  const GuardedMemory d(bytes, at_end), d_a(bytes, at_end), hidden(bytes, at_end);
  const std::vector<double> of_a = random.fill(a, kind, elements);
  const std::vector<double> of_times = random.fill(times, kind, elements);
  const std::vector<double> of_d = random.fill(d, kind, elements);

  using numattn::ActivationFunction;
  constexpr ActivationFunction functions[] = {
      ActivationFunction::gelu, ActivationFunction::gelu_tanh, ActivationFunction::silu,
      ActivationFunction::relu, ActivationFunction::relu_squared};
  numattn::ActivationGradient problem;
  problem.dtype = dtype_of(kind);
  problem.function = functions[random.below(5)];
  problem.a = a.data();
  problem.times = gated ? times.data() : nullptr;
  problem.out = out.data();
  problem.elements = elements;
  problem.d = d.data();
  problem.d_a = gated ? d_a.data() : d.data();
  problem.d_times = gated ? d.data() : nullptr;
  const int threads = 1 + static_cast<int>(random.below(3));
  if (numattn::activate(problem, {threads, nullptr}) != numattn::Status::done) return kInfinity;
  problem.out = hidden.data();
  if (numattn::activate_back(problem, {threads, nullptr}) != numattn::Status::done) {
    return kInfinity;
  }

  const auto curve = [&](double x) -> std::pair<double, double> {  // value and slope
    const double pi = std::acos(-1.0), positive = std::max(x, 0.0);
    const auto of_sigmoid = [&](double y, double rise) {
      const double s = 1 / (1 + std::exp(-y));
      return std::pair{x * s, s + x * s * (1 - s) * rise};
    };
    switch (problem.function) {
      case ActivationFunction::gelu: {
        const double share = std::erfc(-x / std::sqrt(2.0)) / 2;
        return {x * share, share + x * std::exp(-x * x / 2) / std::sqrt(2 * pi)};
      }
      case ActivationFunction::gelu_tanh: {
        const double factor = 2 * std::sqrt(2 / pi);
        return of_sigmoid(factor * (x + 0.044715 * x * x * x), factor * (1 + 0.134145 * x * x));
      }
      case ActivationFunction::silu:
        return of_sigmoid(x, 1);
      case ActivationFunction::relu:
        return {positive, x > 0};
      case ActivationFunction::relu_squared:
        return {positive * positive, 2 * positive};
    }
    return {};
  };
  double largest = 0;
  const double room = kind == Kind::float16 ? 0x1p-24 / rounding(kind) : 0;  // one smallest step
  for (size_t i = 0; i < static_cast<size_t>(elements); ++i) {
    const double x = of_a[i], factor = gated ? of_times[i] : 1;
    const auto compare = [&](const GuardedMemory& memory, double expected, double size) {
      const double actual = load(kind, memory.data() + i * size_of(kind));
      largest = std::max(largest, share_of_allowed(kind, actual, expected, size + room));
    };
    const double size = std::abs(factor) * (1 + x * x);
    const double d_size = std::abs(of_d[i]) * (1 + std::abs(factor)) * (1 + x * x);
    const auto [value, slope] = curve(x);
    compare(out, value * factor, size);
    compare(hidden, value * factor, size);
    compare(gated ? d_a : d, of_d[i] * factor * slope, 2 * d_size);
    if (gated) compare(d, of_d[i] * value, d_size);
  }
  return largest;
}

double norm_error(uint64_t seed) {
  Random random(seed);
  const Kind kind = random.kind();
  const Kind precision = kind == Kind::float64 ? Kind::float64 : Kind::float32;
  const int64_t columns = 1 + (random.sometimes(0.1) ? random.below(5000) : random.below(140));
  const int64_t rows = random.sometimes(0.1) ? 100'000 / columns : random.below(40);
  const auto bytes = static_cast<size_t>(rows * columns) * size_of(kind);
  const auto row_bytes = static_cast<size_t>(columns) * size_of(kind);
  const int64_t parts = numattn::norm_gradient_parts(rows, columns);
  const size_t part_bytes = static_cast<size_t>(parts * columns) * size_of(precision);
  const bool at_end = random.sometimes(0.5), has_bias = random.sometimes(0.5);
  const bool has_add = random.sometimes(0.5), is_centred = random.sometimes(0.5);
  const GuardedMemory x(bytes, at_end), add(bytes, at_end), out(bytes, at_end), d(bytes, at_end);
  const GuardedMemory weight(row_bytes, at_end), bias(row_bytes, at_end);
  const GuardedMemory weight_parts(part_bytes, at_end), bias_parts(part_bytes, at_end);
  std::vector<double> of_x = random.fill(x, kind, rows * columns);
  random.fill(add, kind, rows * columns);
  const std::vector<double> of_d = random.fill(d, kind, rows * columns);
  const std::vector<double> of_weight = random.fill(weight, kind, columns);
  const std::vector<double> of_bias = random.fill(bias, kind, columns);
  for (int64_t i = 0; i < parts * columns; ++i) {
    store(precision, weight_parts.data() + static_cast<size_t>(i) * size_of(precision), 0);
    store(precision, bias_parts.data() + static_cast<size_t>(i) * size_of(precision), 0);
  }

  const auto describe = [&](numattn::Norm& norm) {
    norm.dtype = dtype_of(kind);
    norm.rows = rows;
    norm.columns = columns;
    norm.epsilon = 0.1;
    norm.is_centred = is_centred;
    norm.weight = weight.data();
  };
  numattn::Normalization problem;
  describe(problem);
  problem.x = x.data();
  problem.add = has_add ? add.data() : nullptr;
  problem.bias = has_bias ? bias.data() : nullptr;
  problem.out = out.data();
  const int threads = 1 + static_cast<int>(random.below(3));
  if (numattn::normalize(problem, {threads, nullptr}) != numattn::Status::done) return kInfinity;
  numattn::NormalizationGradient gradient;
  describe(gradient);
  gradient.x = x.data();
  gradient.d = d.data();
  gradient.weight_parts = weight_parts.data();
  gradient.bias_parts = has_bias ? bias_parts.data() : nullptr;
  if (numattn::normalize_back(gradient, {threads, nullptr}) != numattn::Status::done) {
    return kInfinity;
  }

  double largest = 0;
  const auto compare = [&](Kind of, const char* at, double expected, double size) {
    largest = std::max(largest, share_of_allowed(of, load(of, at), expected, size));
  };
  const auto width = static_cast<size_t>(columns);
  std::vector<double> weight_sums(width), bias_sums(width), sizes(width);
  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    const auto n = static_cast<double>(columns);
    std::vector<double> unit(width);
    double sum = 0, squares = 0, of_shift = 0, of_length = 0;
    for (size_t j = 0; j < width; ++j) {
      const size_t i = row * width + j;
      const double stored = load(kind, x.data() + i * size_of(kind));
      if (has_add) {
        const double added = load(kind, add.data() + i * size_of(kind));
        compare(kind, x.data() + i * size_of(kind), of_x[i] + added,
                std::abs(of_x[i]) + std::abs(added));
      }
      unit[j] = stored;
      sum += stored;
    }
    for (double& u : unit) {
      if (is_centred) u -= sum / n;
      squares += u * u;
    }
    const double root = std::sqrt(squares / n + 0.1);
    for (size_t j = 0; j < width; ++j) {
      unit[j] /= root;
      of_shift += of_d[row * width + j] * of_weight[j] / n;
      of_length += of_d[row * width + j] * of_weight[j] * unit[j] / n;
    }
    for (size_t j = 0; j < width; ++j) {
      const size_t i = row * width + j;
      const double term = unit[j] * of_weight[j], added = has_bias ? of_bias[j] : 0;
      const double of_unit = of_d[i] * of_weight[j];
      compare(kind, out.data() + i * size_of(kind), term + added,
              2 * (std::abs(of_weight[j]) * (1 + std::abs(unit[j])) + std::abs(added)));
      compare(kind, d.data() + i * size_of(kind),
              (of_unit - (is_centred ? of_shift : 0) - unit[j] * of_length) / root,
              (4 + 2 * std::abs(of_unit) + 2 * std::abs(unit[j] * of_length)) / root);
      weight_sums[j] += of_d[i] * unit[j];
      bias_sums[j] += has_bias ? of_d[i] : 0;
      sizes[j] += std::abs(of_d[i]) * (1 + std::abs(unit[j]));
    }
  }
  for (size_t j = 0; j < width; ++j) {
    double of_weights = 0, of_biases = 0;
    for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
      const size_t at = (part * width + j) * size_of(precision);
      of_weights += load(precision, weight_parts.data() + at);
      of_biases += load(precision, bias_parts.data() + at);
    }
    largest = std::max(largest, share_of_allowed(precision, of_weights, weight_sums[j], sizes[j]));
    largest = std::max(largest, share_of_allowed(precision, of_biases, bias_sums[j], sizes[j]));
  }
  return largest;
}

// A matrix (rows, columns) with its own memory, in row-major or column-major order.
struct Matrix {
  GuardedMemory memory;
  numattn::View view;
  std::vector<double> values;
  int64_t row_stride, column_stride;  // in elements

  Matrix(Random& random, Kind kind, int64_t rows, int64_t columns)
      : memory(static_cast<size_t>(rows * columns) * size_of(kind), random.sometimes(0.5)),
        values(random.fill(memory, kind, rows * columns)) {
    const bool by_rows = random.sometimes(0.7);
    const auto size = static_cast<int64_t>(size_of(kind));
    row_stride = by_rows ? columns : 1;
    column_stride = by_rows ? 1 : rows;
    view = {memory.data(), 0, row_stride * size, column_stride * size};
  }
  double at(int64_t row, int64_t column) const {
    return values[static_cast<size_t>(row * row_stride + column * column_stride)];
  }
};

double product_error(uint64_t seed) {
  Random random(seed);
  const Kind kind = random.kind();
  const int64_t rows = random.sometimes(0.5) ? 1 + random.below(8) : 1 + random.below(90);
  const int64_t depth = random.sometimes(0.8) ? 1 + random.below(90) : 1 + random.below(700);
  const int64_t columns = 1 + random.below(random.sometimes(0.9) ? 90 : 700);
  const Matrix x(random, kind, rows, depth), weight(random, kind, depth, columns);
  const Matrix out(random, kind, rows, columns), bias(random, kind, 1, columns);

  numattn::Product product;
  product.x = x.view;
  product.weight = weight.view;
  product.out = out.view;
  if (random.sometimes(0.5)) product.bias = bias.memory.data();
  product.rows = rows;
  product.depth = depth;
  product.columns = columns;
  const int threads = 1 + static_cast<int>(random.below(3));
  const auto status = numattn::multiply(dtype_of(kind), &product, 1, {threads, nullptr});
  if (status != numattn::Status::done) return kInfinity;

  double largest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double expected = product.bias ? bias.values[static_cast<size_t>(column)] : 0;
      double size = std::abs(expected);
      for (int64_t step = 0; step < depth; ++step) {
        const double term = x.at(row, step) * weight.at(step, column);
        expected += term;
        size += std::abs(term);
      }
      const char* const at =
          out.view.data + row * out.view.row_stride + column * out.view.column_stride;
      largest = std::max(largest, share_of_allowed(kind, load(kind, at), expected, size));
    }
  }
  return largest;
}

constexpr struct {
  const char* name;
  double (*error_of)(uint64_t seed);
} kOperations[] = {{"softmax", softmax_error},
                   {"rotation", rotation_error},
                   {"activation", activation_error},
                   {"norm", norm_error},
                   {"product", product_error}};

}  // namespace

int main(int count, char** arguments) {
  const uint64_t problems = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 300;
  int failures = 0;
  const bool all_ran = on_every_level([&](const char* isa) {
    for (const auto& [name, error_of] : kOperations) {
      double largest = 0;
      for (uint64_t seed = 1; seed <= problems; ++seed) {
        const double share = error_of(seed);
        largest = std::max(largest, share);
        if (share <= 1) continue;
        std::printf("%s %s seed %llu: %.3g times the error allowed\n", isa, name,
                    static_cast<unsigned long long>(seed), share);
        ++failures;
      }
      std::printf("%s %s: %llu problems, largest error %.2g of what is allowed\n", isa, name,
                  static_cast<unsigned long long>(problems), largest);
    }
  });
  return all_ran && failures == 0 ? 0 : 1;
}
