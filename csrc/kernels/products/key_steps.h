// Which queries of a tile a block's keys are for. Under a causal limit the keys near the diagonal
// are for the later queries alone: leaving the other vectors out there saves what a triangle is
// less than its square, 4 % of the work of 1024 causal tokens.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

// Keys [0, ends[0]) are for all query vectors, keys [ends[i - 1], ends[i]) for those from
// vector i on. What the others would get there is masked.
template <int kVectors>
struct KeySteps {
  int64_t ends[kVectors];

  // The same in units of so many keys: a key more for some vectors.
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

}  // namespace
}  // namespace numattn
