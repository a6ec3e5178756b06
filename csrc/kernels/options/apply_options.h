// Applies the options to the logits of a block, in order, for every driver. Masks follow
// (lane_masks.h, apply_mask). The softmax begins with the sink (sink_of).
#pragma once

#include <cstdint>

#include "kernels/memory/stored_types.h"
#include "kernels/options/lane_map.h"
#include "kernels/options/logits.h"
#include "kernels/task.h"

namespace numattn {
namespace {

inline bool has_alibi(const Task& task) {
  for (int64_t head = 0; task.options.alibi_slopes && head < task.heads; ++head) {
    if (task.options.alibi_slopes[head] != 0) return true;
  }
  return false;
}
inline bool has_sink(const Task& task) {
  for (int64_t head = 0; task.options.sinks && head < task.heads; ++head) {
    if (task.options.sinks[head] > -__builtin_inf()) return true;
  }
  return false;
}
inline double sink_of(const Task& task, int64_t head) {
  return task.options.sinks ? task.options.sinks[head] : -__builtin_inf();
}

// Queries are negated if the scale is negative; everything after that uses its absolute value.
inline int query_sign(const Task& task) { return task.options.scale < 0 ? -1 : 1; }

// The logits are scaled before the softmax if an option needs them scaled, or if the scale is so
// small that its product with a logit of -inf would not be -inf. Otherwise the softmax scales them.
inline bool scales_logits(const Task& task) {
  constexpr double kSmallestScale = 1e-30;
  const Options& options = task.options;
  return options.softcap > 0 || options.bias.data || has_alibi(task) || has_sink(task) ||
         __builtin_fabs(options.scale) < kSmallestScale;
}
inline double softmax_scale(const Task& task) {
  return scales_logits(task) ? 1.0 : __builtin_fabs(task.options.scale);
}

// Whether the softmax takes the products of q and k unchanged, except for masks.
inline bool has_plain_logits(const Task& task) {
  return !scales_logits(task) && !task.k.scales.data;
}

// Applies all options except masks (apply_mask) to logits [key][row]. If capped_slopes [key][row]
// is not null, it receives the derivatives of the capped logits with respect to the logits.
template <class Element, class Map>
void apply_options(const Task& task, const Map& map, const KeySpan& keys,
                   typename Map::Vectors::Scalar* logits,
                   typename Map::Vectors::Scalar* capped_slopes = nullptr) {
  using Vectors = typename Map::Vectors;
  const Options& options = task.options;
  const int64_t count = Map::steps(keys.count) * Map::kLanes;
  if (task.k.scales.data) scale_keys<Map>(task.k, keys, logits);
  if (scales_logits(task)) apply_scale<Vectors>(logits, count, __builtin_fabs(options.scale));
  if (options.softcap > 0) {
    apply_softcap<Vectors>(logits, count, options.softcap);
    if (capped_slopes) find_softcap_slopes<Vectors>(logits, count, options.softcap, capped_slopes);
  }
  if (options.bias.data) {
    with_stored_type<float, Element>(options.bias_is_float32, [&]<class Type>(Stored<Type>) {
      add_bias<Map, Type>(map, options.bias, keys, logits);
    });
  }
  if (has_alibi(task)) add_alibi(map, task, keys, logits);
}

}  // namespace
}  // namespace numattn
