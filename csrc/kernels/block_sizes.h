// What the kernels share: how keys are divided, and how scratch is.
#pragma once

#include <cstdint>

namespace numattn {
namespace {

constexpr int kKeysPerBlock = 96;
// Blocks whose results are added up before they are added to those of all others: the rounding
// errors grow with the blocks of a part plus the number of parts. 20,000 keys have a third of the
// error of one long sum.
constexpr int64_t kBlocksPerPart = 16;

// Decoding goes from K to V and back for each block, and what a CPU fetches by itself loses its way
// then: blocks of twice the size give 1.05 to 1.1 times the speed (Zen 5).
constexpr int kKeysPerDecodeBlock = 192;
constexpr int64_t kKeysPerChunk = 1536;  // a part, and what is handed to a thread
static_assert(kKeysPerChunk % kKeysPerDecodeBlock == 0);

constexpr double kLog2E = 1.4426950408889634;

// Hands out consecutive pieces of the scratch, or counts them where there is none.
struct Arena {
  char* base;
  int64_t used;

  template <class Item>
  void take(Item*& piece, int64_t items) {
    piece = base ? reinterpret_cast<Item*>(base + used) : nullptr;
    used += (items * static_cast<int64_t>(sizeof(Item)) + 63) / 64 * 64;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `step` with a number from 1 to kMost, or kMost if it is larger, as a compile-time constant.
template <int kMost, class Step>
void with_constant(int64_t number, Step step) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_constant<kMost - 1>(number, step);
  }
  step(Constant<kMost>{});
}

}  // namespace
}  // namespace numattn
