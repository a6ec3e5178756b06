// Operations on single rows: softmax and rotary embedding. The lanes are elements of a row.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/memory/stored_types.h"
#include "kernels/memory/strided.h"
#include "kernels/options/lane_masks.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Vectors, class Element>
struct Rows {
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;

  // Scores from `at` on as the softmax sees them: -inf where masked or beyond the row.
  static Vec load_scores(const Element* scores, const uint8_t* mask, int64_t at, int64_t columns) {
    const Vec nothing = Vectors::set(static_cast<Scalar>(-__builtin_inf()));
    const int64_t left = columns - at;
    Vec x = load_up_to<Vectors>(scores + at, left);
    if (left < Vectors::kLanes) x = Vectors::select_bits(lowest_bits(left), x, nothing);
    if (!mask) return x;
    const Vec kept = load_up_to<Vectors>(reinterpret_cast<const Int8*>(mask + at), left);
    return Vectors::select_bits(Vectors::bits_not_equal(kept, Vectors::zero()), x, nothing);
  }

  // Each weight is computed twice, which is cheaper than another pass through memory and avoids
  // rounding to 16 bits in between.
  static void softmax(const void* scores_of_rows, const uint8_t* mask, void* out_of_rows,
                      int64_t rows, int64_t columns) {
    const auto* scores = static_cast<const Element*>(scores_of_rows);
    auto* out = static_cast<Element*>(out_of_rows);
    const Vec log2e = softmax_factor<Vectors>(1.0);
    for (int64_t row = 0; row < rows; ++row) {
      Vec highest = Vectors::set(static_cast<Scalar>(-__builtin_inf()));
      for (int64_t at = 0; at < columns; at += Vectors::kLanes) {
        highest = Vectors::max(highest, load_scores(scores, mask, at, columns));
      }
      Scalar lanes[Vectors::kLanes];
      Vectors::store(lanes, highest);
      Scalar maximum = lanes[0];
      for (int i = 1; i < Vectors::kLanes; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
      const Vec base = softmax_base_of<Vectors>(maximum);
      const auto weigh = [&](int64_t at) {
        return softmax_weight<Vectors>(load_scores(scores, mask, at, columns), base, log2e);
      };
      double total = 0;
      for (int64_t chunk = 0; chunk < columns; chunk += kKeysPerChunk) {
        const int64_t end = columns - chunk < kKeysPerChunk ? columns : chunk + kKeysPerChunk;
        Vec sums = Vectors::zero();
        for (int64_t at = chunk; at < end; at += Vectors::kLanes) {
          sums = Vectors::add(sums, weigh(at));
        }
        total += static_cast<double>(Vectors::sum(sums));
      }
      const Vec factor = Vectors::set(softmax_share(static_cast<Scalar>(total)));
      for (int64_t at = 0; at < columns; at += Vectors::kLanes) {
        store_up_to<Vectors>(out + at, Vectors::mul(weigh(at), factor), columns - at);
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
    for (int64_t i = 0; i < half; i += Vectors::kLanes) {
      const int64_t count = half - i < Vectors::kLanes ? half - i : Vectors::kLanes;
      const auto load = [&](int64_t at) {
        return load_elements<Vectors, Element>(x + at * rows.x.column_stride, rows.x.column_stride,
                                               count);
      };
      const auto store = [&](int64_t at, Vec y) {
        store_elements<Vectors, Element>(out + at * rows.out.column_stride, rows.out.column_stride,
                                         y, count);
      };
      const Vec a = load(i);
      const Vec b = load(half + i);
      const Vec c = load_up_to<Vectors>(cos + i, count);
      const Vec s = load_up_to<Vectors>(sin + i, count);
      store(i, Vectors::sub(Vectors::mul(a, c), Vectors::mul(b, s)));
      store(half + i, Vectors::fma(b, c, Vectors::mul(a, s)));
    }
  }

  // The same for pairs of neighbours.
  static void rotate_neighbours(const char* x, const Scalar* cos, const Scalar* sin, char* out,
                                const RowRotation& rows) {
    constexpr int kPairs = Vectors::kLanes / 2;
    for (int64_t i = 0; i < rows.rotary_dim / 2; i += kPairs) {
      const int64_t left = rows.rotary_dim / 2 - i;
      const int64_t pairs = left < kPairs ? left : kPairs;
      Scalar from[Vectors::kLanes], to[Vectors::kLanes] = {};
      Vectors::store(from, load_elements<Vectors, Element>(x + 2 * i * rows.x.column_stride,
                                                           rows.x.column_stride, 2 * pairs));
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Scalar a = from[2 * pair];
        const Scalar b = from[2 * pair + 1];
        to[2 * pair] = a * cos[i + pair] - b * sin[i + pair];
        to[2 * pair + 1] = b * cos[i + pair] + a * sin[i + pair];
      }
      store_elements<Vectors, Element>(out + 2 * i * rows.out.column_stride, rows.out.column_stride,
                                       Vectors::load(to), 2 * pairs);
    }
  }

  static void rotate(const RowRotation& rows) {
    for (int64_t row = 0; row < rows.rows; ++row) {
      const char* const x = rows.x.data + row * rows.x.row_stride;
      char* const out = rows.out.data + row * rows.out.row_stride;
      const auto* const cos = reinterpret_cast<const Scalar*>(rows.cos + row * rows.angle_stride);
      const auto* const sin = reinterpret_cast<const Scalar*>(rows.sin + row * rows.angle_stride);
      if (rows.interleaved) {
        rotate_neighbours(x, cos, sin, out, rows);
      } else {
        rotate_halves(x, cos, sin, out, rows);
      }
      if (x == out) continue;
      for (int64_t d = rows.rotary_dim; d < rows.dim; ++d) {
        __builtin_memcpy(out + d * rows.out.column_stride, x + d * rows.x.column_stride,
                         sizeof(Element));
      }
    }
  }
};

}  // namespace
}  // namespace numattn
