// Turns the vectors of a level into the table that it exports.
#pragma once

#include <cstdint>

#include "kernels/decode.h"
#include "kernels/memory/stored_types.h"
#include "kernels/prefill.h"
#include "kernels/probes.h"
#include "kernels/rows.h"
#include "kernels/softmax/exp.h"
#include "kernels/stages.h"
#include "kernels/table.h"

namespace numattn {
namespace {

template <class Simd, class Scalar>
void exp2_array(const Scalar* x, Scalar* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd::kLanes) {
    store_up_to<Simd>(y + i, exp2<Simd>(load_up_to<Simd>(x + i, count - i)), count - i);
  }
}

template <class Simd, class Element>
constexpr DtypeKernels kernels_for() {
  using OfTiles = Prefill<Simd, Element>;
  using OfRows = Decode<Simd, Element>;
  return {OfTiles::kRowsPerTile,
          kKeysPerBlock,
          Simd::kTilesPerBlock,
          OfTiles::scratch_bytes,
          OfTiles::run,
          OfRows::kMaxRows,
          static_cast<int>(kKeysPerChunk),
          OfRows::scratch_bytes,
          OfRows::State::bytes,
          OfRows::run,
          OfRows::State::finish,
          Pattern<Simd, Element>::scratch_bytes,
          Pattern<Simd, Element>::run,
          Rows<typename Simd::Single, Element>::softmax,
          Rows<typename Simd::Single, Element>::rotate,
          multiply_adds<Simd>};
}

template <class Float32, class Float64>
constexpr KernelTable make_table(const char* isa) {
  return {isa,
          {kernels_for<Float32, float>(), kernels_for<Float64, double>(),
           kernels_for<Float32, Float16Bits>(), kernels_for<Float32, Bfloat16Bits>()},
          exp2_array<Float32, float>,
          exp2_array<Float64, double>,
          read_floats<Float32>};
}

}  // namespace
}  // namespace numattn
