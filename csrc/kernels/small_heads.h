// Attention for heads with so few queries and keys that packing queries, tiles and states would
// take longer than the products. A task computes its heads one by one. The lanes are elements of a
// vector; all keys of a row get their weights at once.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/constant.h"
#include "kernels/decode_state.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/lane_map.h"
#include "kernels/options/lane_masks.h"
#include "kernels/products/row_products.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/softmax/overflow.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Vectors, class Element>
struct SmallHeads {
  using Scalar = typename Vectors::Scalar;
  using Vec = typename Vectors::Vec;
  // Beyond these limits, tiles are as fast (Zen 3).
  static constexpr int kMaxQueries = 16;
  static constexpr int kMaxKeys = 16;
  static constexpr int kWidth =  // of a row of logits, in whole vectors
      (kMaxKeys + Vectors::kLanes - 1) / Vectors::kLanes * Vectors::kLanes;
  // Products that are summed together fill the lanes of a vector.
  static constexpr int kKeysTogether = Vectors::kLanes < 4 ? Vectors::kLanes : 4;
  static constexpr int kRowsTogether = Vectors::kLanes / kKeysTogether;

  // Rows of scalars, `stride` bytes apart.
  struct RowsOfScalars {
    const char* data;
    int64_t stride;

    const Scalar* row(int64_t i) const {
      return reinterpret_cast<const Scalar*>(data + i * stride);
    }
  };
  struct Scratch {
    Scalar *q, *k, *v;  // [row][d], copies of rows that are not adjacent scalars
    Scalar* weights;    // [query][key]
  };
  static_assert(kMaxKeys <= 64, "the keys that a row attends to are bits");

  static Scratch lay_out(Arena& arena, int64_t head_dim, int64_t value_dim) {
    Scratch scratch;
    arena.take(scratch.q, kMaxQueries * head_dim);
    arena.take(scratch.k, kMaxKeys * head_dim);
    arena.take(scratch.v, kMaxKeys * value_dim);
    arena.take(scratch.weights, kMaxQueries * kWidth);
    return scratch;
  }
  static int64_t scratch_bytes(int64_t head_dim, int64_t value_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, head_dim, value_dim);
    return arena.used;
  }

  // Element d of row i is at row_at(i) + d * column_stride. `stride` is the distance from row to
  // row if rows are evenly spaced, otherwise 0.
  template <class RowAt>
  static RowsOfScalars scalars(RowAt row_at, int64_t stride, int64_t column_stride, int64_t rows,
                               int64_t dims, Scalar* copy) {
    if (std::same_as<Element, Scalar> && stride != 0 &&
        column_stride == static_cast<int64_t>(sizeof(Element))) {
      return {row_at(0), stride};
    }
    for (int64_t row = 0; row < rows; ++row) {
      const char* const from = row_at(row);
      for (int64_t d = 0; d < dims; d += Vectors::kLanes) {
        store_up_to<Vectors>(
            copy + row * dims + d,
            load_elements<Vectors, Element>(from + d * column_stride, column_stride, dims - d),
            dims - d);
      }
    }
    return {reinterpret_cast<const char*>(copy), dims * static_cast<int64_t>(sizeof(Scalar))};
  }
  static RowsOfScalars scalars(const View& view, int64_t rows, int64_t dims, Scalar* copy) {
    return scalars([&](int64_t row) { return view.data + row * view.row_stride; }, view.row_stride,
                   view.column_stride, rows, dims, copy);
  }
  static RowsOfScalars scalars(const KeyRows& keys, int64_t count, Scalar* copy) {
    return scalars([&](int64_t key) { return key_row(keys, key); },
                   keys.pages ? 0 : keys.rows.row_stride, keys.rows.column_stride, count, keys.dims,
                   copy);
  }

  // logits [row][key] = q [row][d] . k [key][d]
  template <int kRows, int kKeys>
  static void multiply(const RowsOfScalars& q, int64_t row, const RowsOfScalars& k, int64_t key,
                       int64_t dims, Scalar* logits) {
    Vec sums[Vectors::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < Vectors::kLanes; ++i) sums[i] = Vectors::zero();
    const auto add = [&](auto load) __attribute__((always_inline)) {
      Vec of_keys[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) of_keys[i] = load(k.row(key + i));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec of_row = load(q.row(row + r));
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) {
          Vec& sum = sums[r * kKeys + i];
          sum = Vectors::fma(of_row, of_keys[i], sum);
        }
      }
    };
    int64_t d = 0;
    for (; d + Vectors::kLanes <= dims; d += Vectors::kLanes) {
      add([&](const Scalar* x) { return Vectors::load(x + d); });
    }
    if (d < dims) add([&](const Scalar* x) { return Vectors::load_first(x + d, dims - d); });
    if constexpr (kRows * kKeys == 1) {
      logits[row * kWidth + key] = Vectors::sum(sums[0]);
    } else {
      Scalar lanes[Vectors::kLanes];
      Vectors::store(lanes, sum_each<Vectors>(sums));
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kKeys; ++i) {
          logits[(row + r) * kWidth + key + i] = lanes[r * kKeys + i];
        }
      }
    }
  }
  template <int kRows>
  static void multiply_keys(const RowsOfScalars& q, int64_t row, const RowsOfScalars& k,
                            int64_t keys, int64_t dims, Scalar* logits) {
    int64_t key = 0;
    for (; key + kKeysTogether <= keys; key += kKeysTogether) {
      multiply<kRows, kKeysTogether>(q, row, k, key, dims, logits);
    }
    for (; key < keys; ++key) multiply<kRows, 1>(q, row, k, key, dims, logits);
  }

  // Applies options and masks to a row's products; returns which keys it attends to. `task` has one
  // head.
  static uint64_t finish_logits(const Task& task, int64_t row, Scalar* logits) {
    using Map = LaneMap<Vectors, 1>;
    const int64_t count = task.valid_keys;
    const QueryRows rows{row, 1, 1};
    const TileKeys limits = tile_keys(task.options, task.first_position + row, 1, 0, count);
    uint64_t attended = lowest_bits(limits.end) & ~lowest_bits(limits.begin);
    const bool has_mask = !mask_is_full(task, count);
    const KeySpan keys{0, count, true, !has_mask};
    for (int64_t key = 0; query_sign(task) < 0 && key < count; ++key) logits[key] = -logits[key];
    if (!has_plain_logits(task)) apply_options<Element>(task, Map{rows}, keys, logits);
    if (has_mask || task.options.bias.data) {
      uint64_t of_keys[kMaxKeys];  // bit 0
      find_attended<kMaxKeys>(task, rows, keys, of_keys);
      if (task.options.bias.data) keep_unbiased<Element>(task.options, rows, keys, of_keys);
      for (int64_t key = 0; key < count; ++key) {
        if ((of_keys[key] & 1) == 0) attended &= ~(uint64_t{1} << key);
      }
    }
    const Vec nothing = Vectors::set(static_cast<Scalar>(-__builtin_inf()));
    for (int64_t key = 0; key < count; key += Vectors::kLanes) {
      const Vec kept = Vectors::select_bits(attended >> key, Vectors::load(logits + key), nothing);
      Vectors::store(logits + key, kept);
    }
    return attended;
  }

  // Turns the logits of a row into weights relative to its largest logit. Returns the factor for
  // sums with these weights; writes the log-sum-exp to `lse` unless it is null.
  static Scalar weigh(const Task& task, Scalar* logits, char* lse) {
    const int64_t keys = task.valid_keys;
    const auto sink = static_cast<Scalar>(sink_of(task, 0));
    const auto write_lse = [&](Scalar maximum, Scalar sum) {
      if (!lse) return;
      const Scalar of_row = log_sum_exp(maximum, sum, softmax_scale(task), 0);
      __builtin_memcpy(lse, &of_row, sizeof(of_row));
    };
    // A single key has weight 1 whatever its finite logit is, so its value need not wait for the
    // logit.
    if (keys == 1 && logits[0] - logits[0] == 0 && is_minus_infinity(sink)) {
      write_lse(logits[0], 1);
      return logits[0] = 1;
    }
    Vec highest = Vectors::set(static_cast<Scalar>(-__builtin_inf()));
    for (int64_t key = 0; key < keys; key += Vectors::kLanes) {
      highest = Vectors::max(highest, Vectors::load(logits + key));
    }
    Scalar lanes[Vectors::kLanes];
    Vectors::store(lanes, highest);
#pragma GCC unroll 5
    for (int width = Vectors::kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) {
        lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
      }
    }
    Scalar maximum = lanes[0];
    const Vec base = softmax_base_of<Vectors>(maximum);
    const Vec scale = softmax_factor<Vectors>(softmax_scale(task));
    Vec sums = Vectors::zero();
    for (int64_t key = 0; key < keys; key += Vectors::kLanes) {
      const Vec weight = softmax_weight<Vectors>(Vectors::load(logits + key), base, scale);
      Vectors::store(logits + key, weight);
      sums = Vectors::add(sums, weight);
    }
    Scalar sum = Vectors::sum(sums);
    Scalar shrink = 1;  // if a sink is larger
    if (!is_minus_infinity(sink)) {
      const Scalar of_logits = maximum;
      if (sink > maximum) maximum = sink;
      const Vec of_both = softmax_base_of<Vectors>(maximum);
      const auto weight = [&](Scalar logit) {
        Vectors::store(lanes, softmax_weight<Vectors>(Vectors::set(logit), of_both, scale));
        return lanes[0];
      };
      shrink = weight(of_logits);
      sum = sum * shrink + weight(sink);
    }
    write_lse(maximum, sum);
    return shrink * softmax_share(sum);
  }

  // out [row][d] = factor [row] * weights [row][key] * v [key][d] for kRows rows. False if a result
  // is not finite. With another kExponent, the power of two by which weights are multiplied, it may
  // be finite.
  template <int kRows, int kExponent>
  static bool aggregate(const Task& task, int64_t row, const RowsOfScalars& v,
                        const Scalar* weights, const Scalar* factors, const uint64_t* attended) {
    constexpr int kVectors = 4;
    const auto shrink = static_cast<Scalar>(power_of_two(kExponent));
    const auto grow = static_cast<Scalar>(power_of_two(-kExponent));
    uint64_t any = 0, all = ~uint64_t{0};
    for (int r = 0; r < kRows; ++r) {
      any |= attended[row + r];
      all &= attended[row + r];
    }
    const int64_t begin = any == 0 ? 0 : __builtin_ctzll(any);
    // Whether all rows attend to all keys from `begin` on.
    const bool are_alike = any == all && (any >> begin & ((any >> begin) + 1)) == 0;
    const bool is_contiguous = task.out.column_stride == static_cast<int64_t>(sizeof(Element));
    FiniteCheck<Vectors> check;
    // kCount whole vectors, or one partial vector.
    const auto columns = [&](int64_t d, auto count, auto is_whole) __attribute__((always_inline)) {
      constexpr int kCount = count.value;
      constexpr bool kIsWhole = is_whole.value == 1;
      Vec sums[kRows][kCount];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sums[r][i] = Vectors::zero();
      }
      const auto add_key = [&](int64_t key, auto attends) __attribute__((always_inline)) {
        Vec values[kCount];
        // One address for all vectors: otherwise the compiler keeps one for each of them on the
        // stack.
        const Scalar* from = v.row(key) + d;
        __asm__("" : "+r"(from));
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          values[i] = kIsWhole ? Vectors::load(from + i * Vectors::kLanes)
                               : Vectors::load_first(from, task.value_dim - d);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          if (!attends(r)) continue;
          const Vec weight = Vectors::set(weights[(row + r) * kWidth + key] * shrink);
#pragma GCC unroll 4
          for (int i = 0; i < kCount; ++i) {
            sums[r][i] = Vectors::fma(weight, values[i], sums[r][i]);
          }
        }
      };
      if (are_alike) {
        for (int64_t key = begin; any >> key != 0; ++key) add_key(key, [](int) { return true; });
      } else {
        for (int64_t key = begin; any >> key != 0; ++key) {
          // A weight of 0 would not keep a NaN out.
          add_key(key, [&](int r) { return (attended[row + r] >> key & 1) != 0; });
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        char* to = task.out.data + (row + r) * task.out.row_stride + d * task.out.column_stride;
        __asm__("" : "+r"(to));
        const Vec factor = Vectors::set(factors[row + r] * grow);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          const Vec product = kExponent == 0 ? Vectors::mul(sums[r][i], factor)
                                             : finite_product<Vectors>(sums[r][i], factor);
          check.add(product);
          if (kIsWhole && is_contiguous) {
            Vectors::store(reinterpret_cast<Element*>(to) + i * Vectors::kLanes, product);
          } else {
            store_elements<Vectors, Element>(to + i * Vectors::kLanes * task.out.column_stride,
                                             task.out.column_stride, product,
                                             kIsWhole ? Vectors::kLanes : task.value_dim - d);
          }
        }
      }
    };
    int64_t d = 0;
    for (; d + kVectors * Vectors::kLanes <= task.value_dim; d += kVectors * Vectors::kLanes) {
      columns(d, Constant<kVectors>{}, Constant<1>{});
    }
    for (; d + Vectors::kLanes <= task.value_dim; d += Vectors::kLanes) {
      columns(d, Constant<1>{}, Constant<1>{});
    }
    if (d < task.value_dim) columns(d, Constant<1>{}, Constant<0>{});
    return check.all_finite();
  }

  // A task of one query head.
  static void attend(const Task& task, const RowsOfScalars& k, const RowsOfScalars& v,
                     const Scratch& scratch) {
    const RowsOfScalars q = scalars(task.q, task.queries, task.head_dim, scratch.q);
    const auto for_rows = [&](auto step) {
      int64_t row = 0;
      for (; row + kRowsTogether <= task.queries; row += kRowsTogether) {
        step(row, Constant<kRowsTogether>{});
      }
      for (; row < task.queries; ++row) step(row, Constant<1>{});
    };
    for_rows([&](int64_t row, auto rows) {
      multiply_keys<rows.value>(q, row, k, task.valid_keys, task.head_dim, scratch.weights);
    });
    uint64_t attended[kMaxQueries];  // a bit for each key
    Scalar factors[kMaxQueries];
    for (int64_t row = 0; row < task.queries; ++row) {
      Scalar* const logits = scratch.weights + row * kWidth;
      attended[row] = finish_logits(task, row, logits);
      factors[row] =
          weigh(task, logits, task.lse.data ? task.lse.data + row * task.lse.row_stride : nullptr);
    }
    for_rows([&](int64_t row, auto rows) {
      constexpr int kRows = rows.value;
      if (aggregate<kRows, 0>(task, row, v, scratch.weights, factors, attended)) return;
      if constexpr (std::same_as<Element, Float16Bits>) return;  // float32 holds their sums
      constexpr int kExponent = -5;
      static_assert(kMaxKeys <= 16, "weights of at most 2^-5 add up to 1/2 at most");
      aggregate<kRows, kExponent>(task, row, v, scratch.weights, factors, attended);
    });
  }

  // All heads of task.kv_heads KV heads, with all of the task.valid_keys keys.
  static bool run(const Task& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    const Scratch scratch = lay_out(arena, task.head_dim, task.value_dim);
    const auto moved = [](View view, int64_t heads) {
      if (view.data) view.data += heads * view.head_stride;
      return view;
    };
    Task alone = task;
    alone.kv_heads = alone.heads = 1;
    for (int64_t kv_head = 0; kv_head < task.kv_heads; ++kv_head) {
      if (task.should_stop(task.stop_context)) return false;
      alone.k.rows = moved(task.k.rows, kv_head);
      alone.v.rows = moved(task.v.rows, kv_head);
      const RowsOfScalars k = scalars(alone.k, task.valid_keys, scratch.k);
      const RowsOfScalars v = scalars(alone.v, task.valid_keys, scratch.v);
      for (int64_t i = 0; i < task.heads; ++i) {
        const int64_t head = kv_head * task.heads + i;
        alone.q = moved(task.q, head);
        alone.out = moved(task.out, head);
        alone.lse = moved(task.lse, head);
        alone.options = options_from_head(task.options, head);
        alone.options.mask = moved(task.options.mask, head);
        alone.options.bias = moved(task.options.bias, head);
        attend(alone, k, v, scratch);
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
