// QK^T: the logits of a block of keys and a tile of queries,
//   logits [key][query lane] = K [key][d] * Qt [d][query lane],
// where d counts units (simd/arithmetic.h). Nothing here is specific to attention: it multiplies
// any rows, read one scalar at a time, by vectors [d][lane].
#pragma once

#include <cstdint>

#include "kernels/block_sizes.h"
#include "kernels/products/by_lane.h"
#include "kernels/products/key_steps.h"
#include "kernels/simd/arithmetic.h"

namespace numattn {
namespace {

// What a register tile reads: kKeys rows of K, in place, and `units` of the queries' units.
template <class Units>
struct QkOperands {
  const typename Units::Unit* k;  // [key][d]
  int64_t k_stride;
  int64_t fetch_distance;               // bytes from a row to another one to prefetch with it; or 0
  const typename Units::Unit* queries;  // [d][lane]
  int64_t units;
  typename Units::Scalar* highest = nullptr;  // [lane], raised to the largest logit; or null
  bool add = false;                           // to the logits, instead of replacing them
};

// One register tile: kKeys keys, with one broadcast per (key, d), times kVectors vectors of
// queries. Queries and logits are kWidth lanes from row to row.
//
// The tile leaves the load units half idle, and each row of K and V comes from memory once for all
// queries. So the tile prefetches the next tile's keys and the values of its own keys: worth 5 % at
// 2048 causal tokens.
template <class Units, int kKeys, int kVectors, int kWidth>
[[gnu::always_inline]] inline void qk_register_tile(const QkOperands<Units>& from,
                                                    typename Units::Scalar* logits) {
  using Vectors = typename Units::Vectors;
  using Unit = typename Units::Unit;
  constexpr int64_t kUnitsPerLine = kCacheLine / static_cast<int64_t>(sizeof(Unit));
  const Unit* const k = from.k;
  const int64_t k_stride = from.k_stride;
  const int64_t next_keys = kKeys * k_stride * static_cast<int64_t>(sizeof(Unit));
  const int64_t fetch_distance = from.fetch_distance;
  const int64_t units = from.units;
  const bool add = from.add;
  const Unit* const queries = from.queries;
  typename Vectors::Vec sums[kKeys][kVectors];
#pragma GCC unroll 12
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) sums[key][i] = Vectors::zero();
  }
  for (int64_t line = 0; line < units; line += kUnitsPerLine) {
#pragma GCC unroll 12
    for (int key = 0; key < kKeys; ++key) {
      const char* const row = reinterpret_cast<const char*>(k + key * k_stride + line);
      __builtin_prefetch(row + next_keys, 0, 3);
      __builtin_prefetch(row + fetch_distance, 0, 2);
    }
    const int64_t end = line + kUnitsPerLine < units ? line + kUnitsPerLine : units;
    int64_t d = line;
    if constexpr (kMultipliesByLane<Units>) {
      for (; d + Vectors::kLanes <= end; d += Vectors::kLanes) {
        multiply_steps<Units>(k + d, k_stride, queries + d * kWidth, kWidth, sums);
      }
    }
#pragma GCC unroll 4
    for (; d < end; ++d) {
      typename Units::Units query[kVectors];
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        query[i] = Units::load(queries + d * kWidth + i * Vectors::kLanes);
      }
#pragma GCC unroll 12
      for (int key = 0; key < kKeys; ++key) {
        const auto unit = Units::set(k[key * k_stride + d]);
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; ++i) {
          sums[key][i] = Units::multiply_add(unit, query[i], sums[key][i]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) {
      auto* const to = logits + key * kWidth + i * Vectors::kLanes;
      if (add) sums[key][i] = Vectors::add(Vectors::load(to), sums[key][i]);
      Vectors::store(to, sums[key][i]);
    }
  }
  if (!from.highest) return;
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) {
    auto highest = Vectors::load(from.highest + i * Vectors::kLanes);
#pragma GCC unroll 12
    for (int key = 0; key < kKeys; ++key) highest = Vectors::max(highest, sums[key][i]);
    Vectors::store(from.highest + i * Vectors::kLanes, highest);
  }
}

template <class Units, int kKeys, int kVectors, int kWidth>
void qk_last_keys(const QkOperands<Units>& from, int64_t keys, typename Units::Scalar* logits) {
  if constexpr (kKeys > 0) {
    if (keys == kKeys) {
      qk_register_tile<Units, kKeys, kVectors, kWidth>(from, logits);
    } else {
      qk_last_keys<Units, kKeys - 1, kVectors, kWidth>(from, keys, logits);
    }
  }
}

// The keys of one step, for kVectors vectors.
template <class Units, int kVectors, int kWidth>
void qk_step(QkOperands<Units> from, int64_t keys, typename Units::Scalar* logits) {
  constexpr int kKeys = RegisterTile<typename Units::Vectors>::scalars(kVectors);
  for (; keys >= kKeys; keys -= kKeys) {
    qk_register_tile<Units, kKeys, kVectors, kWidth>(from, logits);
    from.k += kKeys * from.k_stride;
    logits += kKeys * kWidth;
  }
  qk_last_keys<Units, kKeys - 1, kVectors, kWidth>(from, keys, logits);
}

template <class Units, int kFirst, int kVectors>
void qk_steps(QkOperands<Units> from, const KeySteps<kVectors>& steps,
              typename Units::Scalar* logits) {
  using Vectors = typename Units::Vectors;
  constexpr int kWidth = kVectors * Vectors::kLanes;
  const int64_t begin = kFirst == 0 ? 0 : steps.ends[kFirst > 0 ? kFirst - 1 : 0];
  const int64_t keys = steps.ends[kFirst] - begin;
  if (keys > 0) {
    qk_step<Units, kVectors - kFirst, kWidth>(from, keys, logits);
    from.k += keys * from.k_stride;
  }
  if constexpr (kFirst + 1 < kVectors) {
    from.queries += Vectors::kLanes;
    if (from.highest) from.highest += Vectors::kLanes;
    qk_steps<Units, kFirst + 1>(from, steps, logits + keys * kWidth + Vectors::kLanes);
  }
}

// logits [key][lane], not yet scaled; logits that the steps leave out are undefined.
template <class Units, int kVectors>
void qk_matmul(QkOperands<Units> from, const KeySteps<kVectors>& steps,
               typename Units::Scalar* logits) {
  using Vectors = typename Units::Vectors;
  constexpr int kWidth = kVectors * Vectors::kLanes;
  // Long vectors are summed in pieces, so that the rounding error does not grow with their length.
  constexpr int64_t kUnitsPerSum = Vectors::kFusedMultiplyAdd ? 192 : 32;
  auto* const highest = from.highest;
  for (int64_t left = from.units; left > 0; left -= kUnitsPerSum) {
    from.units = left < kUnitsPerSum ? left : kUnitsPerSum;
    from.highest = left <= kUnitsPerSum ? highest : nullptr;
    qk_steps<Units, 0>(from, steps, logits);
    from.k += kUnitsPerSum;
    from.queries += kUnitsPerSum * kWidth;
    from.add = true;
  }
}

// The same with all keys for all vectors.
template <class Units, int kVectors>
void qk_matmul(QkOperands<Units> from, int64_t keys, typename Units::Scalar* logits) {
  qk_matmul<Units>(from, all_steps<kVectors>(keys), logits);
}

}  // namespace
}  // namespace numattn
