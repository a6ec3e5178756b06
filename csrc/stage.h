// What of attention a call computes.
#pragma once

#include <cstdint>

namespace numattn {

enum class Stage : uint8_t {
  attention,
  logits,      // after all options but the sinks; masked ones are -inf
  statistics,  // each query's largest logit and the sum of its weights, for `received`
  weights,     // what the values are multiplied by
  received,    // for each key its weights, added up over the queries
};

}  // namespace numattn
