// A problem becomes work items: blocks of consecutive queries of one head, each with the keys
// that it attends to.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../kernels/table.h"
#include "mask_kinds.h"

namespace numattn {

class Plan {
 public:
  // `mask_kinds` is null where the problem has no mask. All are kept by reference.
  Plan(const Problem& problem, const DtypeKernels& kernels, const MaskKinds* mask_kinds,
       int num_threads);

  int64_t items() const { return items_; }
  // No more than num_threads, and fewer where the work is not worth waking a thread for.
  int threads() const { return threads_; }
  int64_t rows_per_item() const { return rows_per_item_; }

  // All but the scratch and the stop function, which are the executing thread's. Items of one
  // head stand together, so that its keys stay in the cache, the longest of them first.
  PrefillTask task(int64_t item) const;

 private:
  struct Place {
    int64_t batch_item, head, first_row;
  };
  Place place(int64_t item) const;
  char* address(const Array& array, const Place& place) const;  // null where there is no array
  TileKeys tile_keys(int64_t first_position, int64_t rows, int64_t valid_keys) const;

  const Problem& problem_;
  const DtypeKernels& kernels_;
  const MaskKinds* mask_kinds_;
  int64_t rows_per_item_;
  int64_t items_per_head_;
  int64_t items_;
  int threads_;
};

}  // namespace numattn
