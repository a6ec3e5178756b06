// Dropout: which weights are dropped, as bits kept [key], bit r for row r.
//
// The weight of key j draws its own number, whatever computes it: word j % 4 of Philox4x32-10
// (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with the seed as key and the
// counter (j / 4, query, query head, batch item), each of 32 bits. The weight is dropped if the
// number is below dropout * 2^32, rounded down.
#pragma once

#include <cstdint>

#include "kernels/options/lane_map.h"
#include "kernels/task.h"

namespace numattn {
namespace {

constexpr int kKeysPerDraw = 4;

// The factor of weights that are kept.
inline double kept_scale(const Options& options) { return 1 / (1 - options.dropout); }

// One round for kLanes counters; the key is the same for all.
template <int kLanes>
void philox_round(uint32_t (&words)[kKeysPerDraw][kLanes], uint32_t key_0, uint32_t key_1) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t a = uint64_t{0xD2511F53} * words[0][lane];
    const uint64_t b = uint64_t{0xCD9E8D57} * words[2][lane];
    words[0][lane] = static_cast<uint32_t>(b >> 32) ^ words[1][lane] ^ key_0;
    words[1][lane] = static_cast<uint32_t>(b);
    words[2][lane] = static_cast<uint32_t>(a >> 32) ^ words[3][lane] ^ key_1;
    words[3][lane] = static_cast<uint32_t>(a);
  }
}

// Up to 64 rows of one head.
inline void find_kept(const Task& task, const QueryRows& rows, const KeySpan& keys,
                      uint64_t* kept) {
  constexpr int kLanes = 16;
  constexpr int kRounds = 10;
  const Options& options = task.options;
  const auto threshold = static_cast<uint32_t>(options.dropout * 4294967296.0);
  for (int64_t key = 0; key < keys.count; ++key) kept[key] = 0;
  const int64_t first_draw = keys.first / kKeysPerDraw;
  const int64_t last_draw = (keys.first + keys.count - 1) / kKeysPerDraw;
  for (int64_t draw = first_draw; draw <= last_draw; ++draw) {
    for (int row = 0; row < rows.queries; row += kLanes) {
      uint32_t words[kKeysPerDraw][kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        words[0][lane] = static_cast<uint32_t>(draw);
        words[1][lane] = static_cast<uint32_t>(task.first_row + rows.first_query + row + lane);
        words[2][lane] = static_cast<uint32_t>(task.first_head);
        words[3][lane] = static_cast<uint32_t>(task.batch_item);
      }
      auto key_0 = static_cast<uint32_t>(options.dropout_seed);
      auto key_1 = static_cast<uint32_t>(options.dropout_seed >> 32);
      for (int round = 0; round < kRounds; ++round) {
        philox_round(words, key_0, key_1);
        key_0 += 0x9E3779B9;
        key_1 += 0xBB67AE85;
      }
      for (int word = 0; word < kKeysPerDraw; ++word) {
        const int64_t key = draw * kKeysPerDraw + word - keys.first;
        if (key < 0 || key >= keys.count) continue;
        uint8_t is_kept[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          is_kept[lane] = static_cast<uint8_t>(words[word][lane] >= threshold);
        }
        for (int lane = 0; lane < kLanes; lane += 8) {
          uint64_t bytes;
          __builtin_memcpy(&bytes, is_kept + lane, sizeof(bytes));
          // Each byte's lowest bit moves to its place in the highest byte.
          kept[key] |= (bytes * 0x0102040810204080) >> 56 << (row + lane);
        }
      }
    }
  }
}

}  // namespace
}  // namespace numattn
