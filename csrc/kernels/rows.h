// Rows by themselves: their softmax, and rotary embedding. The lanes are elements of a row.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/stored_types.h"
#include "kernels/memory/strided.h"
#include "kernels/softmax/exp.h"
#include "kernels/table.h"

namespace numattn {
namespace {

template <class Simd, class Element>
struct Rows {
  using Scalar = typename Simd::Scalar;
  using Vec = typename Simd::Vec;

  // Scores from `at` on as the softmax sees them: -inf where masked or beyond the row.
  static Vec load_scores(const Element* scores, const uint8_t* mask, int64_t at, int64_t columns) {
    const Vec nothing = Simd::set(static_cast<Scalar>(-__builtin_inf()));
    const int64_t left = columns - at;
    Vec x = load_up_to<Simd>(scores + at, left);
    if (left < Simd::kLanes) x = Simd::select_bits((uint64_t{1} << left) - 1, x, nothing);
    if (!mask) return x;
    const Vec kept = load_up_to<Simd>(reinterpret_cast<const Int8*>(mask + at), left);
    return Simd::select_bits(Simd::bits_not_equal(kept, Simd::zero()), x, nothing);
  }

  // Each weight is computed twice, which is cheaper than another pass through memory, and leaves no
  // rounding to 16 bits between them.
  static void softmax(const void* scores_of_rows, const uint8_t* mask, void* out_of_rows,
                      int64_t rows, int64_t columns) {
    const auto* scores = static_cast<const Element*>(scores_of_rows);
    auto* out = static_cast<Element*>(out_of_rows);
    const Vec log2e = Simd::set(static_cast<Scalar>(1.4426950408889634));
    for (int64_t row = 0; row < rows; ++row) {
      Vec highest = Simd::set(static_cast<Scalar>(-__builtin_inf()));
      for (int64_t at = 0; at < columns; at += Simd::kLanes) {
        highest = Simd::max(highest, load_scores(scores, mask, at, columns));
      }
      Scalar lanes[Simd::kLanes];
      Simd::store(lanes, highest);
      Scalar maximum = lanes[0];
      for (int i = 1; i < Simd::kLanes; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
      // A row without a key subtracts 0: -inf - -inf would be NaN.
      const Vec base = Simd::set(is_minus_infinity(maximum) ? Scalar{0} : maximum);
      const auto weigh = [&](int64_t at) {
        const Vec difference = Simd::sub(load_scores(scores, mask, at, columns), base);
        return exp2<Simd>(Simd::mul(difference, log2e));
      };
      double total = 0;
      for (int64_t part = 0; part < columns; part += kKeysPerChunk) {
        const int64_t end = columns - part < kKeysPerChunk ? columns : part + kKeysPerChunk;
        Vec sums = Simd::zero();
        for (int64_t at = part; at < end; at += Simd::kLanes) sums = Simd::add(sums, weigh(at));
        total += static_cast<double>(Simd::sum(sums));
      }
      const auto sum = static_cast<Scalar>(total);
      const Vec factor = Simd::set(sum == 0 ? Scalar{0} : 1 / sum);
      for (int64_t at = 0; at < columns; at += Simd::kLanes) {
        store_up_to<Simd>(out + at, Simd::mul(weigh(at), factor), columns - at);
      }
      scores += columns;
      out += columns;
      if (mask) mask += columns;
    }
  }

  // out = a * cos - b * sin and b * cos + a * sin for pairs half of rotary_dim apart.
  static void rotate_halves(const char* x, const Scalar* cos, const Scalar* sin, char* out,
                            const RowRotation& rows) {
    const int64_t half = rows.rotary_dim / 2;
    for (int64_t i = 0; i < half; i += Simd::kLanes) {
      const int64_t count = half - i < Simd::kLanes ? half - i : Simd::kLanes;
      const auto load = [&](int64_t at) {
        return load_elements<Simd, Element>(x + at * rows.x_column_stride, rows.x_column_stride,
                                            count);
      };
      const auto store = [&](int64_t at, Vec y) {
        store_elements<Simd, Element>(out + at * rows.out_column_stride, rows.out_column_stride, y,
                                      count);
      };
      const Vec a = load(i);
      const Vec b = load(half + i);
      const Vec c = load_up_to<Simd>(cos + i, count);
      const Vec s = load_up_to<Simd>(sin + i, count);
      store(i, Simd::sub(Simd::mul(a, c), Simd::mul(b, s)));
      store(half + i, Simd::fma(b, c, Simd::mul(a, s)));
    }
  }

  // The same for neighbours.
  static void rotate_neighbours(const char* x, const Scalar* cos, const Scalar* sin, char* out,
                                const RowRotation& rows) {
    constexpr int kPairs = Simd::kLanes / 2;
    for (int64_t i = 0; i < rows.rotary_dim / 2; i += kPairs) {
      const int64_t left = rows.rotary_dim / 2 - i;
      const int64_t pairs = left < kPairs ? left : kPairs;
      Scalar from[Simd::kLanes], to[Simd::kLanes] = {};
      Simd::store(from, load_elements<Simd, Element>(x + 2 * i * rows.x_column_stride,
                                                     rows.x_column_stride, 2 * pairs));
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Scalar a = from[2 * pair];
        const Scalar b = from[2 * pair + 1];
        to[2 * pair] = a * cos[i + pair] - b * sin[i + pair];
        to[2 * pair + 1] = b * cos[i + pair] + a * sin[i + pair];
      }
      store_elements<Simd, Element>(out + 2 * i * rows.out_column_stride, rows.out_column_stride,
                                    Simd::load(to), 2 * pairs);
    }
  }

  static void rotate(const RowRotation& rows) {
    for (int64_t row = 0; row < rows.rows; ++row) {
      const char* const x = rows.x + row * rows.x_row_stride;
      char* const out = rows.out + row * rows.out_row_stride;
      const auto* const cos = reinterpret_cast<const Scalar*>(rows.cos + row * rows.angle_stride);
      const auto* const sin = reinterpret_cast<const Scalar*>(rows.sin + row * rows.angle_stride);
      if (rows.interleaved) {
        rotate_neighbours(x, cos, sin, out, rows);
      } else {
        rotate_halves(x, cos, sin, out, rows);
      }
      if (x == out) continue;
      for (int64_t d = rows.rotary_dim; d < rows.dim; ++d) {
        __builtin_memcpy(out + d * rows.out_column_stride, x + d * rows.x_column_stride,
                         sizeof(Element));
      }
    }
  }
};

}  // namespace
}  // namespace numattn
