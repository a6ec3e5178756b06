#include "attention.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <stdexcept>

#include "dispatch.h"
#include "plan/plan.h"
#include "scratch.h"
#include "thread_pool.h"

namespace numattn {
namespace {

bool stop_requested(void* stop) { return static_cast<StopCheck*>(stop)->requested(); }

bool classify_mask(const Problem& problem, const Execution& execution, MaskKinds& kinds) {
  // Below that many bytes another thread is not worth its wake-up.
  constexpr int64_t kBytesPerThread = 1 << 18;
  const int64_t bytes = kinds.rows() * problem.key_length;
  const auto classify = [](void* context, int64_t row, StopCheck&) {
    static_cast<MaskKinds*>(context)->classify(row);
    return true;
  };
  return run(
      {classify, &kinds, kinds.rows(),
       static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, execution.num_threads)),
       execution.interrupted});
}

struct Prefilling {
  const Plan& plan;
  const DtypeKernels& kernels;
  int64_t scratch_bytes;
  std::atomic<bool> out_of_memory{false};
};

bool prefill(void* context, int64_t item, StopCheck& stop) {
  auto& prefilling = *static_cast<Prefilling*>(context);
  PrefillTask task = prefilling.plan.task(item);
  const ThreadScratch scratch(prefilling.scratch_bytes);
  task.scratch = scratch.data();
  if (!task.scratch) {
    prefilling.out_of_memory.store(true, std::memory_order_relaxed);
    return false;
  }
  task.should_stop = stop_requested;
  task.stop_context = &stop;
  return prefilling.kernels.prefill(task);
}

Status attention_of_some(const Problem& problem, const Execution& execution) {
  const DtypeKernels& kernels = active_kernels().of(problem.dtype);
  std::optional<MaskKinds> mask_kinds;
  if (problem.mask.data) {
    mask_kinds.emplace(problem, kernels);
    if (!classify_mask(problem, execution, *mask_kinds)) return Status::interrupted;
  }
  const Plan plan(problem, kernels, mask_kinds ? &*mask_kinds : nullptr, execution.num_threads);
  Prefilling prefilling{
      plan, kernels,
      kernels.prefill_scratch_bytes(plan.rows_per_item(), problem.head_dim, problem.value_dim)};
  const bool done =
      run({prefill, &prefilling, plan.items(), plan.threads(), execution.interrupted});
  if (done) return Status::done;
  return prefilling.out_of_memory ? Status::out_of_memory : Status::interrupted;
}

}  // namespace

Status attention(const Problem& problem, const Execution& execution) try {
  bool empty = problem.query_heads == 0 || problem.query_length == 0;
  for (int axis = 0; axis < problem.batch_axes; ++axis) empty |= problem.batch_shape[axis] == 0;
  if (empty) return Status::done;
  return attention_of_some(problem, execution);
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
} catch (const std::length_error&) {
  return Status::out_of_memory;
}

}  // namespace numattn
