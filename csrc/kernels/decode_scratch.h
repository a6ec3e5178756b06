// The scratch of decoding, and the queries of each KV head in it.
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/constant.h"
#include "kernels/decode_state.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_rows.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/products/row_products.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/task.h"

namespace numattn {
namespace {

template <class Arithmetic, class Element>
struct DecodeScratch {
  using Vectors = typename Arithmetic::Vectors;
  using QkUnits = typename Arithmetic::QkUnits;
  using Scalar = typename Vectors::Scalar;
  using QueryElement = typename QkUnits::Element;
  using State = DecodeState<Vectors, Element>;
  static constexpr int kMaxVectors = 2;
  static constexpr int kMaxRows = kMaxVectors * Vectors::kLanes;
  static_assert(kMaxRows <= 64, "a lane mask has 64 bits");
  static_assert(sizeof(typename QkUnits::Unit) >= QkUnits::kElements * sizeof(Element),
                "copies of rows have room for elements as well as for units");

  // One KV head, with the rows of its query heads.
  struct Head {
    Task task;
    State state;
    QueryElement* queries;                // [row][d], negated where the scale is negative
    typename QkUnits::Unit* query_lanes;  // [unit of d][row], where the rows fill the lanes
    Scalar* logits;                       // [key][row], then weights [unit of keys][row]
    Scalar* rescale;                      // [lane]
    Scalar* sums;                         // [row][d], of values while several heads take turns

    void begin(const Task& of_head) {
      task = of_head;
      const QueryRows rows = rows_of(task);
      state = State::at(task.state, rows.count(), task.value_dim);
      state.clear(rows.count(), task.value_dim, task.weight_exponent);
      const int64_t stride = task.q.column_stride;
      const auto sign = Vectors::set(static_cast<Scalar>(query_sign(task)));
      for (int64_t row = 0; row < rows.count(); ++row) {
        const char* const q =
            task.q.data + rows.head(row) * task.q.head_stride + rows.query(row) * task.q.row_stride;
        for (int64_t d = 0; d < task.head_dim; d += Vectors::kLanes) {
          const int64_t left = task.head_dim - d;
          const int64_t count = left < Vectors::kLanes ? left : Vectors::kLanes;
          const auto elements = load_elements<Vectors, Element>(q + d * stride, stride, count);
          store_up_to<Vectors>(queries + row * task.head_dim + d, Vectors::mul(elements, sign),
                               count);
        }
      }
      if (!fills_lanes(rows.count())) return;
      with_constant<kMaxVectors>(width_of_rows(rows.count()) / Vectors::kLanes, [&](auto vectors) {
        constexpr auto kSize = static_cast<int64_t>(sizeof(QueryElement));
        pack_queries<QkUnits, QueryElement, vectors.value>(
            reinterpret_cast<const char*>(queries), task.head_dim * kSize, kSize, rows.count(),
            task.head_dim, 1, query_lanes);
      });
    }
  };

  Head* heads;          // [KV head]
  Scalar* highest;      // [lane]
  const char** k_rows;  // [key of the chunk], and more to be fetched ahead
  const char** v_rows;
  RowCopies copies;

  // Whether there are enough rows to fill the lanes: then decoding uses prefill's QK^T.
  static constexpr bool fills_lanes(int64_t rows) {
    return width_of_rows(rows) >= Vectors::kLanes && width_of_rows(rows) > kRowsTogether<Vectors>;
  }

  static DecodeScratch lay_out(Arena& arena, int64_t kv_heads, int64_t rows, int64_t head_dim,
                               int64_t value_dim) {
    constexpr int64_t kPointers = kKeysPerChunk + kKeysPerDecodeBlock;
    const int64_t units = units_of<QkUnits>(head_dim);
    DecodeScratch scratch;
    arena.take(scratch.heads, kv_heads);
    for (int64_t i = 0; i < kv_heads; ++i) {
      Head counted;
      Head& head = scratch.heads ? scratch.heads[i] : counted;
      arena.take(head.queries, rows * head_dim);
      arena.take(head.query_lanes, fills_lanes(rows) ? units * width_of_rows(rows) : 0);
      arena.take(head.logits, kKeysPerDecodeBlock * width_of_rows(rows));
      arena.take(head.rescale, lanes_of_rows<Vectors>(rows));
      arena.take(head.sums, kv_heads > 1 ? rows * value_dim : 0);
    }
    arena.take(scratch.highest, lanes_of_rows<Vectors>(rows));
    arena.take(scratch.k_rows, kPointers);
    arena.take(scratch.v_rows, kPointers);
    arena.take(scratch.copies.rows, kKeysPerDecodeBlock);
    const int64_t dims = head_dim > value_dim ? head_dim : value_dim;
    arena.take(scratch.copies.elements, kKeysPerDecodeBlock * units_of<QkUnits>(dims) *
                                            static_cast<int64_t>(sizeof(typename QkUnits::Unit)));
    return scratch;
  }
  static int64_t bytes(int64_t kv_heads, int64_t rows, int64_t head_dim, int64_t value_dim) {
    Arena arena{nullptr, 0};
    lay_out(arena, kv_heads, rows, head_dim, value_dim);
    return arena.used;
  }
};

}  // namespace
}  // namespace numattn
