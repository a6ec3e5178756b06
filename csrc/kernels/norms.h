// Norms of rows, forward and backward. A row is read several times, all but the first time from the
// cache; the lanes are elements of a row.
#pragma once

#include <cstdint>

#include "kernels/memory/strided.h"
#include "kernels/options/lane_masks.h"
#include "row_operations.h"

namespace numattn {
namespace {

template <class Vectors, class Element>
struct Norms {
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;
  static constexpr bool kIsDouble = sizeof(Scalar) == 8;
  static constexpr int64_t kLanes = Vectors::kLanes;

  // Calls take(at, left) for each vector of a row.
  template <class Take>
  static void each(int64_t columns, Take take) {
    for (int64_t at = 0; at < columns; at += kLanes) take(at, columns - at);
  }

  static Vec load(const Element* from, int64_t at, int64_t left) {
    return load_up_to<Vectors>(from + at, left);
  }

  // Combines term(at, left) of each vector of a piece of a row, in four independent chains: in a
  // single chain, each step would wait for the previous one.
  template <class Combine, class Term>
  [[gnu::always_inline]] static Vec combine(int64_t begin, int64_t end, int64_t columns,
                                            Combine combine_two, Term term) {
    Vec chains[4] = {Vectors::zero(), Vectors::zero(), Vectors::zero(), Vectors::zero()};
    int64_t at = begin;
    for (; at + 4 * kLanes <= end; at += 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        chains[i] = combine_two(chains[i], term(at + i * kLanes, kLanes));
      }
    }
    for (; at < end; at += kLanes) chains[0] = combine_two(chains[0], term(at, columns - at));
    return combine_two(combine_two(chains[0], chains[1]), combine_two(chains[2], chains[3]));
  }

  // The mean of term(at, left) over a row. Pieces of it are summed separately, so that the rounding
  // error does not grow with the row. The terms of lanes beyond the row have to be 0.
  template <class Term>
  static double mean(int64_t columns, Term term) {
    constexpr int64_t kPiece = 64 * kLanes;
    double total = 0;
    for (int64_t begin = 0; begin < columns; begin += kPiece) {
      const int64_t end = columns - begin < kPiece ? columns : begin + kPiece;
      total += static_cast<double>(Vectors::sum(combine(begin, end, columns, Vectors::add, term)));
    }
    return total / static_cast<double>(columns);
  }

  // The factor of a row. Squares of numbers beyond 1e19 overflow in float32, so the elements of a
  // huge row are multiplied by the power of two that makes them 1 at most, which changes no digit.
  // Other rows have the factor 1.
  static Scalar scale_of(const Element* x, int64_t columns) {
    Scalar lanes[kLanes];
    Vectors::store(lanes,
                   combine(
                       0, columns, columns, [](Vec a, Vec b) { return Vectors::max(b, a); },
                       [&](int64_t at, int64_t left) { return Vectors::abs(load(x, at, left)); }));
    Scalar largest = lanes[0];
    for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    // Sums of 2^31 squares of smaller numbers do not overflow; NaN and infinity stay unchanged.
    constexpr auto kHuge = static_cast<Scalar>(kIsDouble ? 0x1p496 : 0x1p48);
    if (!(largest >= kHuge && largest < static_cast<Scalar>(__builtin_inf()))) return 1;
    int exponent;
    __builtin_frexp(static_cast<double>(largest), &exponent);
    // The reciprocal of the largest power is a normal number.
    constexpr int kMost = kIsDouble ? 1022 : 126;
    if (exponent > kMost) exponent = kMost;
    return static_cast<Scalar>(__builtin_ldexp(1.0, -exponent));
  }

  // A row divided by its root, without its mean: (x * scale - mean) * inverse_root.
  struct Normalized {
    const Element* x;
    int64_t columns;
    Scalar scale, mean, inverse_root;

    Normalized(const Norm& norm, const Element* row) : x(row), columns(norm.columns), mean(0) {
      scale = scale_of(x, columns);
      const double wide_scale = static_cast<double>(scale);
      if (norm.is_centred) {
        mean = static_cast<Scalar>(Norms::mean(columns, [&](int64_t at, int64_t left) {
          return Vectors::mul(load(x, at, left), Vectors::set(scale));
        }));
      }
      const double square = Norms::mean(columns, [&](int64_t at, int64_t left) {
        Vec y = centred(at, left);
        if (left < kLanes) y = Vectors::select_bits(lowest_bits(left), y, Vectors::zero());
        return Vectors::mul(y, y);
      });
      const double epsilon = norm.epsilon * wide_scale * wide_scale;
      inverse_root = static_cast<Scalar>(1 / __builtin_sqrt(square + epsilon));
    }

    Vec centred(int64_t at, int64_t left) const {
      return Vectors::fma(load(x, at, left), Vectors::set(scale), Vectors::set(-mean));
    }
    Vec operator()(int64_t at, int64_t left) const {
      return Vectors::mul(centred(at, left), Vectors::set(inverse_root));
    }
  };

  static void normalize(const Normalization& norm) {
    auto* x = reinterpret_cast<Element*>(norm.x);
    auto* out = reinterpret_cast<Element*>(norm.out);
    const auto* add = reinterpret_cast<const Element*>(norm.add);
    const auto* const weight = reinterpret_cast<const Element*>(norm.weight);
    const auto* const bias = reinterpret_cast<const Element*>(norm.bias);
    for (int64_t row = 0; row < norm.rows; ++row) {
      if (add) {
        each(norm.columns, [&](int64_t at, int64_t left) {
          store_up_to<Vectors>(x + at, Vectors::add(load(x, at, left), load(add, at, left)), left);
        });
        add += norm.columns;
      }
      const Normalized normalized(norm, x);
      each(norm.columns, [&](int64_t at, int64_t left) {
        Vec y = Vectors::mul(normalized(at, left), load(weight, at, left));
        if (bias) y = Vectors::add(y, load(bias, at, left));
        store_up_to<Vectors>(out + at, y, left);
      });
      x += norm.columns;
      out += norm.columns;
    }
  }

  static void add_to(Scalar* sums, int64_t at, int64_t left, Vec x) {
    store_up_to<Vectors>(sums + at, Vectors::add(load_up_to<Vectors>(sums + at, left), x), left);
  }

  static void normalize_back(const NormalizationGradient& norm) {
    const auto* x = reinterpret_cast<const Element*>(norm.x);
    auto* d = reinterpret_cast<Element*>(norm.d);
    const auto* const weight = reinterpret_cast<const Element*>(norm.weight);
    auto* const weight_part = reinterpret_cast<Scalar*>(norm.weight_parts);
    auto* const bias_part = reinterpret_cast<Scalar*>(norm.bias_parts);
    for (int64_t row = 0; row < norm.rows; ++row) {
      const Normalized normalized(norm, x);
      each(norm.columns, [&](int64_t at, int64_t left) {
        const Vec d_here = load(d, at, left);
        add_to(weight_part, at, left, Vectors::mul(d_here, normalized(at, left)));
        if (bias_part) add_to(bias_part, at, left, d_here);
      });
      const auto of_normalized = [&](int64_t at, int64_t left) {
        return Vectors::mul(load(d, at, left), load(weight, at, left));
      };
      // Remove the components that would change the length of the row or shift it.
      const Vec length =
          Vectors::set(static_cast<Scalar>(mean(norm.columns, [&](int64_t at, int64_t left) {
            return Vectors::mul(of_normalized(at, left), normalized(at, left));
          })));
      const Vec shift = norm.is_centred
                            ? Vectors::set(static_cast<Scalar>(mean(norm.columns, of_normalized)))
                            : Vectors::zero();
      const Vec inverse_root = Vectors::set(normalized.inverse_root),
                scale = Vectors::set(normalized.scale);
      each(norm.columns, [&](int64_t at, int64_t left) {
        const Vec kept = Vectors::sub(Vectors::sub(of_normalized(at, left), shift),
                                      Vectors::mul(normalized(at, left), length));
        store_up_to<Vectors>(d + at, Vectors::mul(Vectors::mul(kept, inverse_root), scale), left);
      });
      x += norm.columns;
      d += norm.columns;
    }
  }
};

}  // namespace
}  // namespace numattn
