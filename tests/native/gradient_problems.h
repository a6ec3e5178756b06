// Gradients of random problems. The arrays are between protected pages, and the expected gradients
// are computed in double by the formula.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gradients.h"
#include "problems.h"

class RandomGradients : public RandomProblem {
 public:
  explicit RandomGradients(uint64_t seed) : RandomProblem(seed, true) {
    const auto layout = [&] { return sometimes(0.5) ? Layout::heads_first : Layout::rows_first; };
    const auto add_zeros = [&](const Tensor& like) {
      // Packed, so that rows are aligned to their elements.
      Tensor tensor =
          make(precision_, like.batch, like.heads, like.rows, like.columns, Layout::packed, 0);
      tensor.starts = like.starts;
      if (like.starts) tensor.array.batch_strides[0] = 0;
      return tensor;
    };
    gradients_.dout_is_float32 = size_of(kind_) == 2 && sometimes(0.3);
    dout_ = make_rows(gradients_.dout_is_float32 ? Kind::float32 : kind_, problem.query_starts,
                      problem.query_heads, problem.query_length, problem.value_dim, layout(), 1);
    gradients_.dout = dout_.array;
    if (sometimes(0.3)) {
      dlse_ = make_rows(precision_, problem.query_starts, problem.query_heads, problem.query_length,
                        1, Layout::heads_first, 1);
      gradients_.dlse = dlse_.array;
    }
    dq_ = add_zeros(q_);
    dk_ = add_zeros(k_);
    dv_ = add_zeros(v_);
    gradients_.dq = dq_.array;
    gradients_.dk = dk_.array;
    gradients_.dv = dv_.array;
    if (problem.options.bias.data && sometimes(0.7)) {
      dbias_ = add_zeros(bias_);
      numattn::Array& array = dbias_.array;
      if (sometimes(0.3)) array.batch_strides[0] = 0;
      if (sometimes(0.3)) array.head_stride = 0;
      if (sometimes(0.3)) array.row_stride = 0;
      gradients_.dbias = array;
      gradients_.dbias_batch_strides[0] = array.batch_strides[0];
    }
    gradients_.forward = problem;
  }

  numattn::Status run_backward(int threads) const {
    for (const Tensor* const x : {&dq_, &dk_, &dv_, &dbias_}) {
      if (x->memory) std::memset(x->memory->data(), 0, x->memory->bytes());
    }
    return numattn::attention_backward(gradients_, {threads, nullptr});
  }

  std::vector<char> gradients() const {
    std::vector<char> bytes;
    for (const Tensor* const x : {&dq_, &dk_, &dv_, &dbias_}) {
      if (!x->memory) continue;
      const char* const data = x->memory->data();
      bytes.insert(bytes.end(), data, data + x->memory->bytes());
    }
    return bytes;
  }

  // Uses the out and lse that the kernels read, not exact results of the forward pass.
  double gradient_error_share() const {
    std::vector<Sum> dq(size(dq_)), dk(size(dk_)), dv(size(dv_)), dbias(size(dbias_));
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < problem.query_heads; ++h) {
        const int64_t valid = problem.q_lengths ? problem.q_lengths[b] : queries(b);
        for (int64_t i = 0; i < valid; ++i) add_row(b, h, i, dq, dk, dv, dbias);
      }
    }
    double largest = 0;
    compare(dq_, dq, largest);
    compare(dk_, dk, largest);
    compare(dv_, dv, largest);
    compare(dbias_, dbias, largest);
    return largest;
  }

 private:
  // A sum, and the sum of its summands' sizes, which its rounding error grows with.
  struct Sum {
    double value = 0, size = 0;
    void add(double a, double b, double size_of_a) {
      value += a * b;
      size += size_of_a * std::abs(b);
    }
  };
  static size_t size(const Tensor& x) { return x.memory ? x.memory->bytes() / size_of(x.kind) : 0; }
  // The index of an element in memory. Broadcast elements share one.
  static size_t place(const Tensor& x, int64_t b, int64_t h, int64_t i, int64_t j) {
    return static_cast<size_t>(x.address(b, h, i, j) - x.memory->data()) / size_of(x.kind);
  }

  void add_row(int64_t b, int64_t h, int64_t i, std::vector<Sum>& dq, std::vector<Sum>& dk,
               std::vector<Sum>& dv, std::vector<Sum>& dbias) const {
    const std::vector<double> s = logits(b, h, i);
    const double lse = lse_.stored(b, h, i, 0);
    const double scale = problem.options.scale, softcap = problem.options.softcap;
    double row_sum = dlse_.memory ? -dlse_.value(b, h, i, 0) : 0, row_size = std::abs(row_sum);
    for (int64_t d = 0; d < problem.value_dim; ++d) {
      const double product = out_.stored(b, h, i, d) * dout_.value(b, h, i, d);
      row_sum += product;
      row_size += std::abs(product);
    }
    for (int64_t j = 0; j < static_cast<int64_t>(s.size()); ++j) {
      const double logit = s[static_cast<size_t>(j)];
      if (std::isinf(logit)) continue;
      const double weight = std::exp(logit - lse);
      const double factor = dropout_factor(b, h, i, j);
      double d_weight = 0, d_weight_size = 0, product = 0;
      for (int64_t d = 0; d < problem.value_dim; ++d) {
        const double summand = v_.value(b, h / group_, j, d) * dout_.value(b, h, i, d) * factor;
        d_weight += summand;
        d_weight_size += std::abs(summand);
        dv[place(dv_, b, h / group_, j, d)].add(weight * factor, dout_.value(b, h, i, d),
                                                weight * factor);
      }
      const double d_logit = weight * (d_weight - row_sum);
      const double d_logit_size = weight * (d_weight_size + row_size);
      if (dbias_.memory) dbias[place(dbias_, b, h, i, j)].add(d_logit, 1, d_logit_size);
      for (int64_t d = 0; softcap > 0 && d < problem.head_dim; ++d) {
        product += q_.value(b, h, i, d) * k_.value(b, h / group_, j, d);
      }
      const double capped = softcap > 0 ? std::tanh(product * scale / softcap) : 0;
      const double slope = scale * (1 - capped * capped);
      for (int64_t d = 0; d < problem.head_dim; ++d) {
        dq[place(dq_, b, h, i, d)].add(d_logit * slope, k_.value(b, h / group_, j, d),
                                       d_logit_size * std::abs(scale));
        dk[place(dk_, b, h / group_, j, d)].add(d_logit * slope, q_.value(b, h, i, d),
                                                d_logit_size * std::abs(scale));
      }
    }
  }

  void compare(const Tensor& actual, const std::vector<Sum>& expected, double& largest) const {
    for (size_t i = 0; i < expected.size(); ++i) {
      const double x = load(actual.kind, actual.memory->data() + i * size_of(actual.kind));
      const double error = std::abs(x - expected[i].value);
      if (error == 0) continue;
      // Products of bfloat16 pairs also round weights to bfloat16, and subnormal numbers to 0.
      const Kind kind = kind_ == Kind::bfloat16 ? kind_ : precision_;
      const double allowed =
          rounding(kind) * expected[i].size + (precision_ == Kind::float64 ? 1e-300 : 1e-30);
      const double share = error / allowed;
      largest = std::max(largest, share >= 0 ? share : std::numeric_limits<double>::infinity());
    }
  }

  numattn::GradientProblem gradients_;
  Tensor dout_, dlse_, dq_, dk_, dv_, dbias_;
};
