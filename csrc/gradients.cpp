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

struct Computation {
  const GradientPlan& plan;
  const DtypeKernels& kernels;
  int64_t scalar_bytes;
  std::unique_ptr<std::atomic<int64_t>[]> turns;  // [chunk], the number of items that it has taken
  std::unique_ptr<char[]> parts;                  // of dK [row][d], then of dV, 0 at first
  std::unique_ptr<int64_t[]> part_of_block;       // 0 at first
  std::atomic<bool> out_of_memory{false};

  void set_parts(GradientItem& item) const {
    GradientTask& task = item.task;
    task.dk_part = task.dv_part = {};
    task.part_of_block = nullptr;
    if (!parts) return;
    const auto view = [&](char* begin, int64_t dims) {
      const int64_t bytes = dims * scalar_bytes;
      return View{begin + item.first_part_row * bytes, 0, bytes, scalar_bytes};
    };
    task.dk_part = view(parts.get(), task.head_dim);
    task.dv_part =
        view(parts.get() + plan.part_rows() * task.head_dim * scalar_bytes, task.value_dim);
    task.part_of_block = part_of_block.get() + item.first_part_block;
  }
};

bool compute(void* context, int64_t number, StopCheck& stop) {
  auto& computation = *static_cast<Computation*>(context);
  const DtypeKernels& kernels = computation.kernels;
  GradientItem item = computation.plan.item(number);
  GradientTask& task = item.task;
  computation.set_parts(item);
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
  for (int64_t chunk = 0; chunk < item.chunks; ++chunk) {
    std::atomic<int64_t>& turn = computation.turns[static_cast<size_t>(item.first_turn + chunk)];
    if (!wait_for(turn, item.turn, stop)) return false;
    const int64_t begin = chunk * keys_per_chunk;
    if (!kernels.backward_keys(task, begin, begin + keys_per_chunk)) return false;
    if (item.is_last) kernels.backward_end(task, begin, begin + keys_per_chunk);
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
  Computation computation{plan, kernels, forward.dtype == Dtype::float64 ? 8 : 4, {}, {}, {}};
  computation.turns = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(plan.turns()));
  if (plan.has_parts()) {
    const int64_t elements = plan.part_rows() * (forward.head_dim + forward.value_dim);
    computation.parts =
        std::make_unique<char[]>(static_cast<size_t>(elements * computation.scalar_bytes));
    computation.part_of_block =
        std::make_unique<int64_t[]>(static_cast<size_t>(plan.part_blocks()));
  }
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
