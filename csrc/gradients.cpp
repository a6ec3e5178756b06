#include "gradients.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>

#include "plan/gradient_plan.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

bool stop_requested(void* stop) { return static_cast<StopCheck*>(stop)->requested(); }

struct Computation {
  const GradientPlan& plan;
  const DtypeKernels& kernels;
  std::unique_ptr<std::atomic<int64_t>[]> turns;  // [chunk], how many items it has taken
  std::atomic<bool> out_of_memory{false};
};

bool compute(void* context, int64_t number, StopCheck& stop) {
  auto& computation = *static_cast<Computation*>(context);
  const DtypeKernels& kernels = computation.kernels;
  GradientItem item = computation.plan.item(number);
  GradientTask& task = item.task;
  const ThreadScratch scratch(kernels.backward_scratch_bytes(task));
  if (!scratch.data()) {
    computation.out_of_memory.store(true, std::memory_order_relaxed);
    return false;
  }
  task.scratch = scratch.data();
  task.should_stop = stop_requested;
  task.stop_context = &stop;
  kernels.backward_begin(task);
  const int64_t keys_per_chunk = kernels.keys_per_backward_chunk;
  for (int64_t chunk = 0; chunk < computation.plan.chunks_per_item(); ++chunk) {
    std::atomic<int64_t>& turn = computation.turns[static_cast<size_t>(item.first_chunk + chunk)];
    if (!wait_for(turn, item.turn, stop)) return false;
    const int64_t begin = chunk * keys_per_chunk;
    if (!kernels.backward_keys(task, begin, begin + keys_per_chunk)) return false;
    turn.store(item.turn + 1, std::memory_order_release);
  }
  return true;
}

Status gradients_of_some(const GradientProblem& problem, const Execution& execution) {
  const Problem& forward = problem.forward;
  const DtypeKernels& kernels = active_level().kernels.of(forward.dtype);
  std::optional<BlockKinds> block_kinds;
  if (forward.options.mask.data && forward.options.tail_mask_keys < 0) {
    block_kinds.emplace(forward, kernels.queries_per_backward_tile, kernels.keys_per_block);
    if (!block_kinds->classify_all(execution)) return Status::interrupted;
  }
  const GradientPlan plan(problem, kernels, block_kinds ? &*block_kinds : nullptr,
                          execution.num_threads);
  Computation computation{plan, kernels, nullptr};
  computation.turns = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(plan.chunks()));
  const bool done =
      run({compute, &computation, plan.items(), plan.threads(), execution.interrupted});
  if (done) return Status::done;
  return computation.out_of_memory ? Status::out_of_memory : Status::interrupted;
}

}  // namespace

Status attention_backward(const GradientProblem& problem, const Execution& execution) try {
  const Problem& forward = problem.forward;
  bool empty = forward.query_heads == 0 || forward.query_length == 0 || forward.key_length == 0;
  for (int axis = 0; axis < forward.batch_axes; ++axis) empty |= forward.batch_shape[axis] == 0;
  return empty ? Status::done : gradients_of_some(problem, execution);
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
} catch (const std::length_error&) {
  return Status::out_of_memory;
}

}  // namespace numattn
