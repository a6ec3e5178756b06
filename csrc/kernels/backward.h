// The backward pass: for tiles of queries and blocks of keys, five products and no transposes.
//
//   logits          [key][query] = K [key][d] * Qt [d][query]
//   d weights       [key][query] = V [key][d] * dOt [d][query]
//   weights = exp(logits - lse),  d logits = weights * (d weights - row sums)
//   dV [key][d]   += weights  [key][query] * dO [query][d]
//   dK [key][d]   += d logits [key][query] * Q  [query][d]
//   dQ [query][d] += d logits [key][query] * K  [key][d]
//
// by the method of FlashAttention (Dao et al., 2022). The row sums are the sums of dO * O over each
// row. In the first two products the lanes are queries, as in prefill.h, so that options, masks and
// powers are the same code. In the others the lanes are elements of a row.
//
// What a tile and a block add to dQ, dK and dV is summed separately first. A query tile adds its
// blocks in order, and a block its tiles in order: so the bits are the same whichever thread adds.
#pragma once

#include <cstdint>

#include "kernels/backward_tile.h"
#include "kernels/block_sizes.h"
#include "kernels/memory/arena.h"
#include "kernels/memory/key_block.h"
#include "kernels/memory/strided.h"
#include "kernels/options/apply_options.h"
#include "kernels/options/dropout.h"
#include "kernels/options/lane_masks.h"
#include "kernels/products/key_steps.h"
#include "kernels/products/matmul.h"
#include "kernels/simd/arithmetic.h"
#include "kernels/softmax/online_softmax.h"
#include "kernels/task.h"

namespace numattn {
namespace {

// An Element is what the arrays q, k and v hold.
template <class Arithmetic, class Element>
struct Backward {
  using Vectors = typename Arithmetic::Vectors;
  using Vec = typename Vectors::Vec;
  using Scalar = typename Vectors::Scalar;
  using Tile = BackwardTile<Arithmetic, Element>;
  using QkUnits = typename Tile::QkUnits;
  using QkUnit = typename Tile::QkUnit;
  using Units = typename Tile::Units;
  using Unit = typename Tile::Unit;
  static constexpr int kPerUnit = Tile::kPerUnit;
  static constexpr int kLanes = Tile::kLanes;
  static constexpr int kVectors = Tile::kVectors;
  static constexpr int kQueriesPerTile = Tile::kMaxQueries;
  using Map = TileMap<Vectors, kVectors>;
  static constexpr int kKeysPerChunk = 2 * kKeysPerBlock;
  static constexpr int kMaxTiles = 4;
  static constexpr int kTilesPerPart = 64;
  static_assert(kMaxTiles <= kMaxTilesPerBlock);
  // Under a causal limit, this many vectors of queries are skipped together if they attend to
  // nothing.
  static constexpr int kVectorsPerStep = kLanes >= 16 ? 1 : RegisterTile<Vectors>::kVectors;
  static constexpr int kSteps = kVectors / kVectorsPerStep;
  static constexpr int kQueriesPerStep = kQueriesPerTile / kSteps;
  using Steps = KeySteps<kSteps>;

  static int64_t padded(int64_t dims) { return Tile::padded(dims); }

  struct Scratch {
    Tile tiles[kMaxTiles];
    int tile_count;
    Scalar* weights;        // [key][lane], first logits
    Scalar* slopes;         // [key][lane], d weights, then d logits
    Scalar* capped_slopes;  // [key][lane]
    Unit* slopes_by_key;    // [unit of keys][lane], d logits rounded to units of several elements
    QkUnit* k_copy;         // [key][unit of d]
    QkUnit* v_copy;         // [key][unit of d]
    Unit* k_rows;           // [unit of keys][d], 0 in place of NaN and infinity
    int64_t bytes;
  };

  static Scratch lay_out(const GradientTask& task) {
    Arena arena{static_cast<char*>(task.scratch), 0};
    Scratch scratch{};
    const int64_t pairs = int64_t{kKeysPerBlock} * kQueriesPerTile;
    arena.take(scratch.weights, pairs);
    arena.take(scratch.slopes, pairs);
    arena.take(scratch.capped_slopes, task.options.softcap > 0 ? pairs : 0);
    arena.take(scratch.slopes_by_key, kPerUnit == 1 ? 0 : pairs / kPerUnit);
    arena.take(scratch.k_copy, kKeysPerBlock * units_of<QkUnits>(task.head_dim));
    arena.take(scratch.v_copy, kKeysPerBlock * units_of<QkUnits>(task.value_dim));
    arena.take(scratch.k_rows, units_of<Units>(kKeysPerBlock) * padded(task.head_dim));
    for (int64_t first = 0; first < task.queries; first += kQueriesPerTile) {
      const int64_t left = task.queries - first;
      Tile& tile = scratch.tiles[scratch.tile_count++];
      tile.rows = {first, left < kQueriesPerTile ? left : kQueriesPerTile, 1};
      tile.lay_out(arena, task.head_dim, task.value_dim);
    }
    scratch.bytes = arena.used;
    return scratch;
  }
  static int64_t scratch_bytes(const GradientTask& task) {
    GradientTask without_memory = task;
    without_memory.scratch = nullptr;
    return lay_out(without_memory).bytes;
  }

  // As many as fit in the second-level cache with everything that is kept of them.
  static int64_t max_queries(int64_t head_dim, int64_t value_dim) {
    constexpr int64_t kBytes = 512 << 10;
    const int64_t bytes_per_query = 2 * (head_dim + value_dim) * int64_t{sizeof(Scalar)};
    const int64_t tiles = kBytes / (bytes_per_query * kQueriesPerTile);
    return (tiles < 1 ? 1 : tiles > kMaxTiles ? kMaxTiles : tiles) * kQueriesPerTile;
  }

  static void begin(const GradientTask& task) {
    const Scratch scratch = lay_out(task);
    // Options also read lanes without a query, which no product writes.
    int64_t keys = 0, lanes = kQueriesPerTile;
    for (int t = 0; t < scratch.tile_count; ++t) {
      keys = task.tile_keys[t].end > keys ? task.tile_keys[t].end : keys;
      const int64_t used = padded(scratch.tiles[t].rows.queries);
      lanes = used < lanes ? used : lanes;
    }
    for (int64_t key = 0; key < keys && key < kKeysPerBlock; ++key) {
      for (int64_t lane = lanes; lane < kQueriesPerTile; ++lane) {
        scratch.weights[key * kQueriesPerTile + lane] = 0;
        scratch.slopes[key * kQueriesPerTile + lane] = 0;
      }
    }
    for (int t = 0; t < scratch.tile_count; ++t) scratch.tiles[t].begin(task);
  }

  // ---- one tile, one key block ----------------------------------------------------------------

  struct Block {
    int64_t first, count;  // keys
    KeyBlock<QkUnit> k, v;
    const Unit* k_rows;
    Scalar *dk, *dv;
    int64_t dk_stride, dv_stride;

    // The same block from a later key on, which begins a unit.
    Block from(int64_t key, int64_t end, int64_t head_dim) const {
      Block some = *this;
      some.k.data += (key - first) * k.stride;
      some.v.data += (key - first) * v.stride;
      some.k_rows += (key - first) / kPerUnit * padded(head_dim);
      some.dk += (key - first) * dk_stride;
      some.dv += (key - first) * dv_stride;
      some.first = key;
      some.count = end - key;
      return some;
    }
  };

  // Calls `use` with the keys [begin, end) of each step and the first query that attends to them.
  template <class Use>
  static void for_steps(const Steps& steps, int64_t queries, Use use) {
    int64_t begin = 0;
    for (int step = 0; step < kSteps; ++step) {
      const int64_t first_query = int64_t{step} * kQueriesPerStep;
      if (first_query >= queries) return;
      if (steps.ends[step] > begin) use(begin, steps.ends[step], first_query);
      begin = steps.ends[step];
    }
  }

  // pairs [key][lane] = keys [key][d] * queries [d][lane]
  static void multiply_pairs(const KeyBlock<QkUnit>& keys, const QkUnit* queries, int64_t dims,
                             const Steps& steps, int64_t count, Scalar* pairs) {
    for_steps(steps, count, [&](int64_t begin, int64_t end, int64_t first) {
      matmul<Scalars::by_row, QkUnits>(
          {keys.row(begin), keys.stride, queries + first, kQueriesPerTile, units_of<QkUnits>(dims),
           pairs + begin * kQueriesPerTile + first, kQueriesPerTile, false},
          end - begin, padded(count) - first);
    });
  }

  // to [key][d] += pairs [key][unit of queries] * rows [unit of queries][d]
  static void add_to_keys(const Unit* pairs, const Unit* rows, int64_t dims, const Steps& steps,
                          int64_t count, Scalar* to, int64_t to_stride) {
    for_steps(steps, count, [&](int64_t begin, int64_t end, int64_t first) {
      matmul<Scalars::by_row, Units>(
          {pairs + begin * kQueriesPerTile + first / kPerUnit, kQueriesPerTile,
           rows + first / kPerUnit * padded(dims), padded(dims), units_of<Units>(count - first),
           to + begin * to_stride, to_stride, true},
          end - begin, dims);
    });
  }

  // dq [query][d] += pairs [unit of keys][query] * rows [unit of keys][d]
  static void add_to_queries(const Unit* pairs, const Unit* rows, int64_t dims, const Steps& steps,
                             int64_t count, Scalar* dq, int64_t dq_stride) {
    for (int step = 0; step < kSteps; ++step) {
      const int64_t first = int64_t{step} * kQueriesPerStep;
      if (first >= count) return;
      // The queries of this step and of all later steps whose keys end at the same key.
      int last = step;
      while (last + 1 < kSteps && steps.ends[last + 1] == steps.ends[step]) ++last;
      const int64_t end = (last + 1) * int64_t{kQueriesPerStep};
      matmul<Scalars::by_step, Units>(
          {pairs + first, kQueriesPerTile, rows, padded(dims), units_of<Units>(steps.ends[step]),
           dq + first * dq_stride, dq_stride, true},
          (end < count ? end : count) - first, dims);
      step = last;
    }
  }

  // Turns logits and d weights into weights and d logits times `factor`. `attended` [key] are the
  // bits of the queries that attend to a key, `kept` [key] those whose weights dropout keeps.
  template <bool kMasked, bool kDrops>
  static void find_slopes(const GradientTask& task, const Tile& tile, const Scratch& scratch,
                          const Steps& steps, [[maybe_unused]] const uint64_t* attended,
                          [[maybe_unused]] const uint64_t* kept, Scalar factor) {
    constexpr int kTogether = 2;  // vectors
    static_assert(kVectors % kTogether == 0);
    const auto scale = softmax_factor<Vectors>(softmax_scale(task));
    const auto by = Vectors::set(factor);
    [[maybe_unused]] const auto grow = Vectors::set(static_cast<Scalar>(kept_scale(task.options)));
    for_steps(steps, tile.rows.queries, [&](int64_t begin, int64_t end, int64_t first) {
      const int64_t first_lane = first / (kTogether * kLanes) * (kTogether * kLanes);
      for (int64_t lane = first_lane; lane < tile.rows.queries; lane += kTogether * kLanes) {
        Vec base[kTogether], base_rest[kTogether], row_sum[kTogether];
        for (int i = 0; i < kTogether; ++i) {
          base[i] = Vectors::load(tile.base + lane + i * kLanes);
          base_rest[i] = Vectors::load(tile.base_rest + lane + i * kLanes);
          row_sum[i] = Vectors::load(tile.row_sum + lane + i * kLanes);
        }
        for (int64_t key = begin; key < end; ++key) {
          Scalar* const weights = scratch.weights + key * kQueriesPerTile + lane;
          Scalar* const slopes = scratch.slopes + key * kQueriesPerTile + lane;
          Vec weight[kTogether];
#pragma GCC unroll 2
          for (int i = 0; i < kTogether; ++i) {
            const Vec difference = Vectors::sub(Vectors::load(weights + i * kLanes), base[i]);
            weight[i] = Vectors::mul(Vectors::sub(difference, base_rest[i]), scale);
          }
          exp2<Vectors, kTogether, false>(weight);
#pragma GCC unroll 2
          for (int i = 0; i < kTogether; ++i) {
            Vec slope = Vectors::load(slopes + i * kLanes);
            const Vec before_dropout = weight[i];
            if constexpr (kDrops) {
              const uint64_t lanes = kept[key] >> (lane + i * kLanes);
              const Vec factors = Vectors::select_bits(lanes, grow, Vectors::zero());
              weight[i] = Vectors::mul(weight[i], factors);
              slope = Vectors::select_bits(lanes, Vectors::mul(slope, grow), Vectors::zero());
            }
            slope = Vectors::mul(Vectors::mul(before_dropout, Vectors::sub(slope, row_sum[i])), by);
            if constexpr (kMasked) {
              const uint64_t lanes = attended[key] >> (lane + i * kLanes);
              weight[i] = Vectors::select_bits(lanes, weight[i], Vectors::zero());
              slope = Vectors::select_bits(lanes, slope, Vectors::zero());
            }
            Vectors::store(weights + i * kLanes, weight[i]);
            Vectors::store(slopes + i * kLanes, slope);
          }
        }
      }
    });
  }

  // If queries, heads or batch items share a bias, their d logits add up in its gradient. The d
  // logits of a tile that share an element are summed separately first.
  static void add_to_bias(const GradientTask& task, const Tile& tile, const Block& block,
                          const Steps& steps, const Scalar* slopes) {
    const View& dbias = task.dbias;
    const auto element = [&](int64_t query, int64_t key) {
      return dbias.data + (tile.rows.first_query + query) * dbias.row_stride +
             (block.first + key) * dbias.column_stride;
    };
    const auto add = [&](int64_t query, int64_t key, double x) {
      char* const at = element(query, key);
      Scalar sum;
      __builtin_memcpy(&sum, at, sizeof(sum));
      sum += static_cast<Scalar>(x);
      __builtin_memcpy(at, &sum, sizeof(sum));
    };
    if (dbias.column_stride == 0) {  // keys share it
      for (int64_t query = 0; query < tile.rows.queries; ++query) {
        const int64_t end = steps.ends[query / kQueriesPerStep];
        double of_block = 0;
        for (int64_t key = 0; key < end; ++key) {
          of_block += static_cast<double>(slopes[key * kQueriesPerTile + query]);
        }
        add(query, 0, of_block);
      }
      return;
    }
    for_steps(steps, tile.rows.queries, [&](int64_t begin, int64_t end, int64_t first) {
      if (dbias.row_stride == 0) {  // queries share it
        for (int64_t key = begin; key < end; ++key) {
          double of_tile = 0;
          for (int64_t query = first; query < tile.rows.queries; ++query) {
            of_tile += static_cast<double>(slopes[key * kQueriesPerTile + query]);
          }
          add(0, key, of_tile);
        }
        return;
      }
      for (int64_t key = begin; key < end; key += kLanes) {
        const int64_t keys = end - key < kLanes ? end - key : kLanes;
        for (int64_t lane = first; lane < tile.rows.queries; lane += kLanes) {
          const int64_t left = tile.rows.queries - lane;
          const int64_t queries = left < kLanes ? left : kLanes;
          Vec of_queries[kLanes];  // [query][key]
          load_transposed<Vectors, Scalar>(
              reinterpret_cast<const char*>(slopes + key * kQueriesPerTile + lane),
              kQueriesPerTile * sizeof(Scalar), sizeof(Scalar), keys, queries, of_queries);
          for (int64_t i = 0; i < queries; ++i) {
            char* const at = element(lane + i, key);
            const Vec before = load_elements<Vectors, Scalar>(at, dbias.column_stride, keys);
            store_elements<Vectors, Scalar>(at, dbias.column_stride,
                                            Vectors::add(before, of_queries[i]), keys);
          }
        }
      }
    });
  }

  // do_rows has 0 in place of NaN and infinity. Adds them to dV here, for the queries that attend.
  static void add_non_finite_douts(const GradientTask& task, const Tile& tile, const Block& block,
                                   const Steps& steps, const uint64_t* attended,
                                   const Scalar* weights) {
    for_steps(steps, tile.rows.queries, [&](int64_t begin, int64_t end, int64_t first) {
      for (int64_t d = 0; d < task.value_dim; ++d) {
        for (int64_t query = first; query < tile.rows.queries; ++query) {
          const Scalar x =
              QkUnits::element(tile.douts[d / QkUnits::kElements * kQueriesPerTile + query],
                               static_cast<int>(d % QkUnits::kElements));
          if (x - x == 0) continue;
          for (int64_t key = begin; key < end; ++key) {
            if ((attended[key] >> query & 1) == 0) continue;
            block.dv[key * block.dv_stride + d] += weights[key * kQueriesPerTile + query] * x;
          }
        }
      }
    });
  }

  // Turns lanes from `first` on into units of neighbouring lanes, in place. Some lanes before them
  // change too, which nothing reads.
  static void narrow(Scalar* lanes, int64_t first, int64_t count) {
    constexpr int64_t kTogether = int64_t{kPerUnit} * kLanes;
    for (int64_t lane = first / kTogether * kTogether; lane < count; lane += kTogether) {
      Vec elements[kPerUnit];
      for (int i = 0; i < kPerUnit; ++i) elements[i] = Vectors::load(lanes + lane + i * kLanes);
      Units::store(reinterpret_cast<Unit*>(lanes) + lane / kPerUnit, Units::narrow(elements));
    }
  }

  // Turns weights and d logits [key][lane] into units along the lanes, in place. Returns the d
  // logits as units along the keys, the last of which is padded with 0. If a unit is one scalar,
  // nothing changes.
  static const Unit* round_to_units(const Scratch& scratch, const Steps& steps, int64_t keys,
                                    int64_t queries) {
    if constexpr (kPerUnit == 1) {
      return reinterpret_cast<const Unit*>(scratch.slopes);
    } else {
      if (keys % kPerUnit != 0) {
        for (int64_t lane = 0; lane < kQueriesPerTile; ++lane) {
          scratch.slopes[keys * kQueriesPerTile + lane] = 0;
        }
      }
      for_steps(steps, queries, [&](int64_t begin, int64_t end, int64_t first) {
        for (int64_t key = begin; key < end; key += kPerUnit) {
          Scalar* const slopes = scratch.slopes + key * kQueriesPerTile;
          for (int64_t lane = first; lane < queries; lane += kLanes) {
            Vec of_keys[kPerUnit];
            for (int i = 0; i < kPerUnit; ++i) {
              of_keys[i] = Vectors::load(slopes + i * kQueriesPerTile + lane);
            }
            Units::store(scratch.slopes_by_key + key / kPerUnit * kQueriesPerTile + lane,
                         Units::join_rounded(of_keys));
          }
        }
        for (int64_t key = begin; key < end; ++key) {
          narrow(scratch.weights + key * kQueriesPerTile, first, queries);
          narrow(scratch.slopes + key * kQueriesPerTile, first, queries);
        }
      });
      return scratch.slopes_by_key;
    }
  }

  static void add_pairs(const GradientTask& task, const Tile& tile, const Scratch& scratch,
                        Block block, bool within_limits, bool mask_is_full) {
    const KeySpan keys{block.first, block.count, within_limits, mask_is_full};
    const int64_t queries = tile.rows.queries;
    uint64_t attended[kKeysPerBlock];
    const bool masked = !within_limits || !mask_is_full || task.options.bias.data;
    if (masked || !*tile.douts_are_finite) {
      find_attended<kKeysPerBlock>(task, tile.rows, keys, attended);
      if (task.options.bias.data) {
        keep_unbiased<Element>(task.options, tile.rows, keys, attended);
      }
    }
    const int64_t limit_of_first_query =
        task.first_position + tile.rows.first_query + task.options.window_right + 1;
    Steps steps =
        key_steps<kSteps, kQueriesPerStep>(limit_of_first_query - block.first, block.count);
    // The keys of a unit are never split: keys that a step does not attend to are masked.
    for (int64_t& end : steps.ends) {
      end = units_of<Units>(end) * kPerUnit;
      if (end > block.count) end = block.count;
    }

    multiply_pairs(block.k, tile.queries, task.head_dim, steps, queries, scratch.weights);
    multiply_pairs(block.v, tile.douts, task.value_dim, steps, queries, scratch.slopes);
    apply_options<Element>(task, Map{tile.rows}, keys, scratch.weights, scratch.capped_slopes);
    const auto scale = static_cast<Scalar>(task.options.scale);
    const bool scales_later = task.options.softcap > 0 || task.dbias.data;
    const Scalar factor = scales_later ? Scalar{1} : scale;
    uint64_t kept[kKeysPerBlock];
    const bool drops = task.options.dropout > 0;
    if (drops) find_kept(task, tile.rows, keys, kept);
    const auto find = masked  ? drops ? find_slopes<true, true> : find_slopes<true, false>
                      : drops ? find_slopes<false, true>
                              : find_slopes<false, false>;
    find(task, tile, scratch, steps, attended, kept, factor);
    if (task.dbias.data) add_to_bias(task, tile, block, steps, scratch.slopes);
    if (scales_later) {
      const auto by = Vectors::set(scale);
      for_steps(steps, queries, [&](int64_t begin, int64_t end, int64_t first) {
        for (int64_t key = begin; key < end; ++key) {
          for (int64_t lane = first; lane < queries; lane += kLanes) {
            const int64_t i = key * kQueriesPerTile + lane;
            Vec slope = Vectors::mul(Vectors::load(scratch.slopes + i), by);
            if (task.options.softcap > 0) {
              // The slope of a masked logit may be NaN, like the logit.
              const Vec capped = Vectors::mul(slope, Vectors::load(scratch.capped_slopes + i));
              slope = Vectors::select_equal(slope, Vectors::zero(), slope, capped);
            }
            Vectors::store(scratch.slopes + i, slope);
          }
        }
      });
    }

    if (!*tile.douts_are_finite) {
      add_non_finite_douts(task, tile, block, steps, attended, scratch.weights);
    }
    const Unit* const slopes_by_key = round_to_units(scratch, steps, block.count, queries);
    const auto* const weights = reinterpret_cast<const Unit*>(scratch.weights);
    const auto* const slopes = reinterpret_cast<const Unit*>(scratch.slopes);
    add_to_keys(weights, tile.do_rows, task.value_dim, steps, queries, block.dv, block.dv_stride);
    add_to_keys(slopes, tile.q_rows, task.head_dim, steps, queries, block.dk, block.dk_stride);
    add_to_queries(slopes_by_key, block.k_rows, task.head_dim, steps, queries,
                   row_of<Scalar>(task.dq, tile.rows.first_query),
                   elements<Scalar>(task.dq.row_stride));
  }

  // ---- all tiles, some keys -------------------------------------------------------------------

  template <class Type>
  static Type* row_of(const View& view, int64_t row) {
    return reinterpret_cast<Type*>(view.data + row * view.row_stride);
  }
  template <class Type>
  static int64_t elements(int64_t bytes) {
    return bytes / static_cast<int64_t>(sizeof(Type));
  }

  static Block load(const GradientTask& task, const Scratch& scratch, int64_t first,
                    int64_t count) {
    Block block;
    block.first = first;
    block.count = count;
    block.k = k_block<QkUnits, Element>(task.k, first, count, scratch.k_copy);
    block.v = k_block<QkUnits, Element>(task.v, first, count, scratch.v_copy);
    View k_rows = task.k.rows;
    k_rows.data += first * k_rows.row_stride;
    Tile::template copy_rows<Element>(k_rows, count, task.head_dim, scratch.k_rows);
    block.k_rows = scratch.k_rows;
    const View& dk = task.dk_part.data ? task.dk_part : task.dk;
    const View& dv = task.dv_part.data ? task.dv_part : task.dv;
    block.dk = row_of<Scalar>(dk, first);
    block.dv = row_of<Scalar>(dv, first);
    block.dk_stride = elements<Scalar>(dk.row_stride);
    block.dv_stride = elements<Scalar>(dv.row_stride);
    return block;
  }

  // Adds a block's part to its total, and sets the part to 0.
  static void end_part(const GradientTask& task, int64_t first) {
    const int64_t left = task.valid_keys - first;
    const int64_t keys = left < kKeysPerBlock ? left : kKeysPerBlock;
    const auto move = [&](const View& part, const View& to, int64_t dims) {
      for (int64_t key = first; key < first + keys; ++key) {
        Scalar* const sums = row_of<Scalar>(part, key);
        Scalar* const totals = row_of<Scalar>(to, key);
        for (int64_t d = 0; d < dims; d += kLanes) {
          const Vec before = load_up_to<Vectors>(totals + d, dims - d);
          const Vec sum = load_up_to<Vectors>(sums + d, dims - d);
          store_up_to<Vectors>(totals + d, Vectors::add(before, sum), dims - d);
          store_up_to<Vectors>(sums + d, Vectors::zero(), dims - d);
        }
      }
    };
    move(task.dk_part, task.dk, task.head_dim);
    move(task.dv_part, task.dv, task.value_dim);
  }

  static void end_keys(const GradientTask& task, int64_t begin, int64_t end) {
    if (!task.dk_part.data) return;
    for (int64_t first = begin; first < end && first < task.valid_keys; first += kKeysPerBlock) {
      end_part(task, first);
    }
  }

  struct KeyRange {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
  };

  // A tile's keys in the block [first, end); the keys of a unit are never split.
  static KeyRange keys_in_block(const TileKeys& keys, int64_t first, int64_t end) {
    return {keys.begin > first ? keys.begin / kPerUnit * kPerUnit : first,
            keys.end < end ? keys.end : end};
  }

  // False if it was stopped.
  static bool add_keys(const GradientTask& task, int64_t begin, int64_t end) {
    const Scratch scratch = lay_out(task);
    for (int64_t first = begin; first < end; first += kKeysPerBlock) {
      if (task.should_stop(task.stop_context)) return false;
      const int64_t block_end = end - first < kKeysPerBlock ? end : first + kKeysPerBlock;
      // The keys that any tile attends to. Keys outside may not exist in memory.
      KeyRange all{INT64_MAX, 0};
      for (int t = 0; t < scratch.tile_count; ++t) {
        const KeyRange range = keys_in_block(task.tile_keys[t], first, block_end);
        if (range.empty()) continue;
        if (block_kind(task, t, first / kKeysPerBlock, range.end) == BlockKind::empty) continue;
        all.begin = range.begin < all.begin ? range.begin : all.begin;
        all.end = range.end > all.end ? range.end : all.end;
      }
      if (all.empty()) continue;
      const Block block = load(task, scratch, all.begin, all.end - all.begin);
      for (int i = 0; i < scratch.tile_count; ++i) {
        const int t = last_queries_come_first(task.options) ? scratch.tile_count - 1 - i : i;
        const TileKeys& keys = task.tile_keys[t];
        const KeyRange range = keys_in_block(keys, first, block_end);
        if (range.empty()) continue;
        const BlockKind kind = block_kind(task, t, first / kKeysPerBlock, range.end);
        if (kind == BlockKind::empty) continue;
        if (task.dk_part.data) {
          int64_t& part = task.part_of_block[first / kKeysPerBlock];
          const int64_t part_of_tile = (task.first_tile + i) / kTilesPerPart;
          if (part != part_of_tile) end_part(task, first);
          part = part_of_tile;
        }
        add_pairs(
            task, scratch.tiles[t], scratch, block.from(range.begin, range.end, task.head_dim),
            keys.full_begin <= range.begin && range.end <= keys.full_end, kind == BlockKind::full);
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace numattn
