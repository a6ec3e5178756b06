// Turns the Simd of a level into the table that it exports.
#pragma once

#include <cstdint>

#include "exp.h"
#include "peak.h"
#include "prefill.h"
#include "table.h"

namespace numattn {
namespace {

template <class Simd>
void exp2_array(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd::kLanes) {
    const int64_t last = count - i < Simd::kLanes ? count - i : Simd::kLanes;
    Simd::store_first(y + i, exp2<Simd>(Simd::load_first(x + i, last)), last);
  }
}

template <class Simd>
constexpr KernelTable make_table(const char* isa, int max_tiles_per_block) {
  return {isa,
          Prefill<Simd>::kRowsPerTile,
          kKeysPerBlock,
          max_tiles_per_block,
          Prefill<Simd>::scratch_bytes,
          Prefill<Simd>::run,
          exp2_array<Simd>,
          multiply_adds<Simd>};
}

}  // namespace
}  // namespace numattn
