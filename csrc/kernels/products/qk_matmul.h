// The first stage: the logits of a block of keys and a tile of queries,
//   logits [key][query lane] = K [key][d] * Qt [d][query lane],
// where d counts units: single elements, or pairs of 16-bit ones (simd/scalar_units.h).
#pragma once

#include <cstdint>

#include "kernels/products/key_steps.h"

namespace numattn {
namespace {

constexpr int64_t kCacheLine = 64;

// What a register tile reads: kKeys rows of K where they lie, and `units` of the queries' units.
template <class Simd>
struct QkOperands {
  const typename Simd::Unit* k;  // [key][d]
  int64_t k_stride;
  int64_t v_distance;  // bytes from a key's row of K to its row of V, to be fetched; or 0
  const typename Simd::Unit* queries;  // [d][lane]
  int64_t units;
  bool add;                        // to the logits, instead of replacing them
  typename Simd::Scalar* highest;  // [lane], raised to the largest logit; or null
};

// One register tile: kKeys keys, with one broadcast per (key, d), against kVectors vectors of
// queries. kWidth lanes are a row of queries and logits.
//
// The tile leaves the load units half idle, and a head's K and V come from far away once for all
// of its queries. So it fetches the next tile's keys, and the values that its own keys will need,
// which is worth 5 % at 2048 causal tokens.
template <class Simd, int kKeys, int kVectors, int kWidth>
[[gnu::always_inline]] inline void qk_register_tile(const QkOperands<Simd>& from,
                                                    typename Simd::Scalar* logits) {
  using Unit = typename Simd::Unit;
  constexpr int64_t kUnitsPerLine = kCacheLine / static_cast<int64_t>(sizeof(Unit));
  const Unit* const k = from.k;
  const int64_t k_stride = from.k_stride;
  const int64_t next_keys = kKeys * k_stride * static_cast<int64_t>(sizeof(Unit));
  const int64_t v_distance = from.v_distance;
  const int64_t units = from.units;
  const bool add = from.add;
  const Unit* const queries = from.queries;
  typename Simd::Vec sums[kKeys][kVectors];
#pragma GCC unroll 12
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) sums[key][i] = Simd::zero();
  }
  for (int64_t line = 0; line < units; line += kUnitsPerLine) {
#pragma GCC unroll 12
    for (int key = 0; key < kKeys; ++key) {
      const char* const row = reinterpret_cast<const char*>(k + key * k_stride + line);
      __builtin_prefetch(row + next_keys, 0, 3);
      __builtin_prefetch(row + v_distance, 0, 2);
    }
    const int64_t end = line + kUnitsPerLine < units ? line + kUnitsPerLine : units;
    for (int64_t d = line; d < end; ++d) {
      typename Simd::Units query[kVectors];
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        query[i] = Simd::load(queries + d * kWidth + i * Simd::kLanes);
      }
#pragma GCC unroll 12
      for (int key = 0; key < kKeys; ++key) {
        const auto unit = Simd::set(k[key * k_stride + d]);
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; ++i) {
          sums[key][i] = Simd::multiply_add(unit, query[i], sums[key][i]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; ++i) {
      auto* const to = logits + key * kWidth + i * Simd::kLanes;
      if (add) sums[key][i] = Simd::add(Simd::load(to), sums[key][i]);
      Simd::store(to, sums[key][i]);
    }
  }
  if (!from.highest) return;
#pragma GCC unroll 12
  for (int i = 0; i < kVectors; ++i) {
    auto highest = Simd::load(from.highest + i * Simd::kLanes);
#pragma GCC unroll 12
    for (int key = 0; key < kKeys; ++key) highest = Simd::max(highest, sums[key][i]);
    Simd::store(from.highest + i * Simd::kLanes, highest);
  }
}

template <class Simd, int kKeys, int kVectors, int kWidth>
void qk_last_keys(const QkOperands<Simd>& from, int64_t keys, typename Simd::Scalar* logits) {
  if constexpr (kKeys > 0) {
    if (keys == kKeys) {
      qk_register_tile<Simd, kKeys, kVectors, kWidth>(from, logits);
    } else {
      qk_last_keys<Simd, kKeys - 1, kVectors, kWidth>(from, keys, logits);
    }
  }
}

// The keys of one step, for kVectors vectors.
template <class Simd, int kVectors, int kWidth>
void qk_step(QkOperands<Simd> from, int64_t keys, typename Simd::Scalar* logits) {
  constexpr int kKeys = Simd::broadcast_rows(kVectors);
  for (; keys >= kKeys; keys -= kKeys) {
    qk_register_tile<Simd, kKeys, kVectors, kWidth>(from, logits);
    from.k += kKeys * from.k_stride;
    logits += kKeys * kWidth;
  }
  qk_last_keys<Simd, kKeys - 1, kVectors, kWidth>(from, keys, logits);
}

template <class Simd, int kFirst, int kVectors>
void qk_steps(QkOperands<Simd> from, const KeySteps<kVectors>& steps,
              typename Simd::Scalar* logits) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  const int64_t begin = kFirst == 0 ? 0 : steps.ends[kFirst > 0 ? kFirst - 1 : 0];
  const int64_t keys = steps.ends[kFirst] - begin;
  if (keys > 0) {
    qk_step<Simd, kVectors - kFirst, kWidth>(from, keys, logits);
    from.k += keys * from.k_stride;
  }
  if constexpr (kFirst + 1 < kVectors) {
    from.queries += Simd::kLanes;
    if (from.highest) from.highest += Simd::kLanes;
    qk_steps<Simd, kFirst + 1>(from, steps, logits + keys * kWidth + Simd::kLanes);
  }
}

// logits [key][lane], not yet scaled; those that the steps leave out are undefined.
template <class Simd, int kVectors>
void qk_matmul(QkOperands<Simd> from, const KeySteps<kVectors>& steps,
               typename Simd::Scalar* logits) {
  constexpr int kWidth = kVectors * Simd::kLanes;
  // Long vectors are summed in pieces, so that the rounding error doesn't grow with all of them.
  constexpr int64_t kUnitsPerSum = Simd::kFusedMultiplyAdd ? 192 : 32;
  auto* const highest = from.highest;
  for (int64_t left = from.units; left > 0; left -= kUnitsPerSum) {
    from.units = left < kUnitsPerSum ? left : kUnitsPerSum;
    from.highest = left <= kUnitsPerSum ? highest : nullptr;
    qk_steps<Simd, 0>(from, steps, logits);
    from.k += kUnitsPerSum;
    from.queries += kUnitsPerSum * kWidth;
    from.add = true;
  }
}

}  // namespace
}  // namespace numattn
