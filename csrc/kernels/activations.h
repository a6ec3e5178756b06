// The functions between the two matrices of a feed-forward network, and their slopes, element by
// element.
#pragma once

#include <cstdint>

#include "kernels/memory/strided.h"
#include "kernels/softmax/exp.h"
#include "row_operations.h"

namespace numattn {
namespace {

// Q(x) is the probability that a standard normal variable exceeds x. For x >= 0, Q(x) exp(x^2 / 2)
// (x + 4) is a polynomial in u = (x - 4) / (x + 4), -1 <= u < 1, to a relative error of 4e-8 in
// float32 and 1e-16 in float64. The coefficients are from its Chebyshev series, highest power
// first. The form is from Shepherd and Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2)
// erfc x in 0 <= x < infinity", Mathematics of Computation 36, 1981.
template <class Scalar>
struct TailSeries;
template <>
struct TailSeries<float> {
  static constexpr float kTerms[] = {
      -0.00015732057f, 0.000129325681f, 0.0015637869f, -0.00347616789f, -0.00751223138f,
      0.0603952959f,   -0.186526711f,   0.387137563f,  -0.607896404f,   0.755285127f};
};
template <>
struct TailSeries<double> {
  static constexpr double kTerms[] = {
      -1.6886576966786735e-09, -1.277235143295772e-09,  1.60673869573294e-08,
      1.9569608939974048e-08,  -7.878360342693638e-08,  -1.622316320853567e-07,
      2.647337281979868e-07,   1.026984070143193e-06,   -6.249551077565178e-07,
      -5.922893777541928e-06,  7.146021531267462e-07,   3.514560235904452e-05,
      -1.907676030719098e-06,  -0.00023109513778728935, 0.00013334420916014778,
      0.0016308184854735856,   -0.0034796923566515025,  -0.007540188968891619,
      0.06039657489036092,     -0.1865218579595787,     0.3871374007422266,
      -0.607896641971893,      0.7552851304157514};
};

template <class Vectors, class Element>
struct Activations {
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;
  struct Curve {
    Vec value, slope;  // the compiler drops the slope where it is not used
  };

  static Vec set(double x) { return Vectors::set(static_cast<Scalar>(x)); }
  static Vec min(Vec limit, Vec x) { return Vectors::select_less(limit, x, limit, x); }

  // a P(X <= a) for a standard normal X
  [[gnu::always_inline]] static Curve gelu(Vec a) {
    const Vec half = set(0.5);
    const Vec x = min(set(40), Vectors::abs(a));  // Q(40) is 0 in float64
    const Vec gauss = exp<Vectors>(Vectors::mul(Vectors::mul(x, x), set(-0.5)));
    const Vec inverse = Vectors::div(set(1), Vectors::add(x, set(4)));
    const Vec u[1] = {Vectors::fma(inverse, set(-8), set(1))};
    Vec series[1];
    sum_series<Vectors>(TailSeries<Scalar>::kTerms, u, series);
    const Vec tail = Vectors::mul(series[0], inverse);  // Q(x) exp(x^2 / 2)
    // The slope is P + a P'. At -x it is Q(x) - x P'(x); at x it is 1 minus that.
    constexpr double kLargestDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
    const Vec below = Vectors::mul(Vectors::fma(x, set(-kLargestDensity), tail), gauss);
    const Vec sign = Vectors::copy_sign(set(1), a);
    return {
        Vectors::sub(Vectors::max(Vectors::zero(), a), Vectors::mul(Vectors::mul(tail, gauss), x)),
        Vectors::fma(sign, Vectors::sub(half, below), half)};
  }

  // 1 / (1 + exp(minus_y))
  [[gnu::always_inline]] static Vec sigmoid(Vec minus_y) {
    return Vectors::div(set(1), Vectors::add(set(1), exp<Vectors>(minus_y)));
  }

  // a (1 + tanh z) / 2, z = sqrt(2 / pi) (a + 0.044715 a^3). This is a / (1 + exp(-2 z)), which
  // keeps the precision of small values.
  [[gnu::always_inline]] static Curve gelu_tanh(Vec a) {
    constexpr double kOfA = 1.5957691216057308;  // 2 sqrt(2 / pi)
    constexpr double kOfCube = 0.044715 * kOfA;
    // Beyond these limits the sigmoid is 0 or 1.
    const Vec near = Vectors::max(set(-30), min(set(30), a));
    const Vec square = Vectors::mul(near, near);
    const Vec s = sigmoid(Vectors::mul(Vectors::fma(square, set(-kOfCube), set(-kOfA)), near));
    // With s = sigmoid(y): s + a s (1 - s) dy/da.
    const Vec rise = Vectors::mul(Vectors::fma(square, set(3 * kOfCube), set(kOfA)), near);
    const Vec of_s = Vectors::mul(Vectors::mul(rise, s), Vectors::sub(set(1), s));
    return {Vectors::mul(a, s), Vectors::add(of_s, s)};
  }

  // a s for s = 1 / (1 + exp(-a))
  [[gnu::always_inline]] static Curve silu(Vec a) {
    const Vec s = sigmoid(Vectors::sub(Vectors::zero(), a));
    // s + a s (1 - s)
    const Vec slope = Vectors::mul(Vectors::fma(Vectors::sub(set(1), s), a, set(1)), s);
    return {Vectors::mul(a, s), slope};
  }

  [[gnu::always_inline]] static Curve relu(Vec a) {
    const Vec zero = Vectors::zero();
    return {Vectors::max(zero, a), Vectors::select_less(zero, a, set(1), zero)};
  }

  [[gnu::always_inline]] static Curve relu_squared(Vec a) {
    const Vec positive = Vectors::max(Vectors::zero(), a);
    return {Vectors::mul(positive, positive), Vectors::add(positive, positive)};
  }

  // Reads an array from element `at` on.
  struct Reader {
    int64_t at, left;
    Vec operator()(const char* from) const {
      return load_up_to<Vectors>(reinterpret_cast<const Element*>(from) + at, left);
    }
    void store(char* to, Vec x) const {
      store_up_to<Vectors>(reinterpret_cast<Element*>(to) + at, x, left);
    }
  };

  template <Curve (*kFunction)(Vec)>
  static void apply(const Activation& elements) {
    for (int64_t at = 0; at < elements.elements; at += Vectors::kLanes) {
      const Reader load{at, elements.elements - at};
      Vec y = kFunction(load(elements.a)).value;
      if (elements.times) y = Vectors::mul(y, load(elements.times));
      load.store(elements.out, y);
    }
  }

  template <Curve (*kFunction)(Vec)>
  static void differentiate(const ActivationGradient& elements) {
    for (int64_t at = 0; at < elements.elements; at += Vectors::kLanes) {
      const Reader load{at, elements.elements - at};
      auto [value, slope] = kFunction(load(elements.a));
      const Vec d = load(elements.d);
      if (!elements.times) {
        load.store(elements.out, value);
        load.store(elements.d_a, Vectors::mul(d, slope));
        continue;
      }
      const Vec times = load(elements.times);
      load.store(elements.out, Vectors::mul(value, times));
      load.store(elements.d_a, Vectors::mul(Vectors::mul(d, times), slope));
      load.store(elements.d_times, Vectors::mul(d, value));
    }
  }

  // Calls `use` with the function as a template argument.
  template <class Use>
  static void with_function(ActivationFunction function, Use use) {
    switch (function) {
      case ActivationFunction::gelu:
        return use.template operator()<gelu>();
      case ActivationFunction::gelu_tanh:
        return use.template operator()<gelu_tanh>();
      case ActivationFunction::silu:
        return use.template operator()<silu>();
      case ActivationFunction::relu:
        return use.template operator()<relu>();
      case ActivationFunction::relu_squared:
        return use.template operator()<relu_squared>();
    }
  }

  static void activate(const Activation& elements) {
    with_function(elements.function,
                  [&]<Curve (*kFunction)(Vec)>() { apply<kFunction>(elements); });
  }

  static void activate_back(const ActivationGradient& elements) {
    with_function(elements.function,
                  [&]<Curve (*kFunction)(Vec)>() { differentiate<kFunction>(elements); });
  }
};

}  // namespace
}  // namespace numattn
