// Builds the table that a level exports from its vectors and units.
#pragma once

#include "kernels/activations.h"
#include "kernels/backward.h"
#include "kernels/block_sizes.h"
#include "kernels/decode.h"
#include "kernels/decode_tiles.h"
#include "kernels/memory/stored_types.h"
#include "kernels/norms.h"
#include "kernels/prefill.h"
#include "kernels/projection.h"
#include "kernels/rows.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/small_heads.h"
#include "kernels/stages.h"
#include "kernels/table.h"

namespace numattn {
namespace {

// Elements are what arrays hold.
template <class Arithmetic, class Element>
  requires ReadsAndWrites<typename Arithmetic::Vectors, Element> &&
           Reads<typename Arithmetic::Vectors, float> && Reads<typename Arithmetic::Vectors, Int8>
constexpr DtypeKernels kernels_for() {
  using Vectors = typename Arithmetic::Vectors;
  using OfTiles = Prefill<Arithmetic, Element>;
  using OfRows = Decode<Arithmetic, Element>;
  using OfGroups = DecodeTiles<Arithmetic, Element>;
  using OfSmall = SmallHeads<Vectors, Element>;
  using OfStages = Stages<Arithmetic, Element>;
  using OfGradients = Backward<Arithmetic, Element>;
  using OfProjections = Projection<Arithmetic, Element>;
  return {
      .queries_per_tile = OfTiles::kQueriesPerTile,
      .keys_per_block = kKeysPerBlock,
      .max_tiles_per_block = RegisterTile<Vectors>::kTilesPerBlock,
      .prefill_scratch_bytes = OfTiles::scratch_bytes,
      .prefill = OfTiles::run,
      .max_decode_rows = OfRows::kMaxRows,
      .max_decode_queries = OfGroups::kMaxQueries,
      .keys_per_chunk = static_cast<int>(kKeysPerChunk),
      .decode_scratch_bytes = OfRows::scratch_bytes,
      .decode = OfRows::run,
      .decode_tiles_scratch_bytes = OfGroups::scratch_bytes,
      .decode_tiles = OfGroups::run,
      .decode_state_bytes = OfRows::State::bytes,
      .decode_finish = OfRows::State::finish,
      .max_small_queries = OfSmall::kMaxQueries,
      .max_small_keys = OfSmall::kMaxKeys,
      .small_scratch_bytes = OfSmall::scratch_bytes,
      .attend_small = OfSmall::run,
      .queries_per_backward_tile = OfGradients::kQueriesPerTile,
      .keys_per_backward_chunk = OfGradients::kKeysPerChunk,
      .max_backward_queries = OfGradients::max_queries,
      .backward_scratch_bytes = OfGradients::scratch_bytes,
      .backward_begin = OfGradients::begin,
      .backward_keys = OfGradients::add_keys,
      .backward_end = OfGradients::end_keys,
      .tiles_per_backward_part = OfGradients::kTilesPerPart,
      .stage_scratch_bytes = OfStages::scratch_bytes,
      .run_stage = OfStages::run,
      .projection_limits = OfProjections::limits,
      .projection_scratch_bytes = OfProjections::scratch_bytes,
      .project = OfProjections::run,
      .softmax_rows = Rows<Vectors, Element>::softmax,
      .rotate_rows = Rows<Vectors, Element>::rotate,
      .activate = Activations<Vectors, Element>::activate,
      .activate_back = Activations<Vectors, Element>::activate_back,
      .normalize_rows = Norms<Vectors, Element>::normalize,
      .normalize_rows_back = Norms<Vectors, Element>::normalize_back,
  };
}

template <class Float32, class Float64>
constexpr KernelTable make_table() {
  using Single = Arithmetic<Float32>;
  return {{kernels_for<Single, float>(), kernels_for<Arithmetic<Float64>, double>(),
           kernels_for<Single, Float16Bits>(), kernels_for<Single, Bfloat16Bits>()}};
}

}  // namespace
}  // namespace numattn
