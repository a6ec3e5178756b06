// Softmax of rows, rotary embedding and products with matrices through their public headers: random
// problems on every ISA level, between protected pages, against the formula in double.
//
//   row_operations_test PROBLEMS
#include "row_operations.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
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
  // Memory for `count` numbers, and their values as they were stored.
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

// Largest error over what is allowed.
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

// A matrix (rows, columns) in memory of its own, row after row or column after column.
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
} kOperations[] = {
    {"softmax", softmax_error}, {"rotation", rotation_error}, {"product", product_error}};

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
