#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>

#include "plan/fewer_axes.h"
#include "plan/index.h"
#include "plan/plan.h"
#include "problem.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

struct Computation {
  Computation(const Plan& plan, const DtypeKernels& kernels) : plan(plan), kernels(kernels) {}

  const Plan& plan;
  const DtypeKernels& kernels;
  int64_t state_bytes = 0;         // of one chunk's state
  std::unique_ptr<char[]> states;  // [state], from the first address aligned to 64 bytes on
  std::unique_ptr<std::atomic<int64_t>[]> chunks_done;  // [first state of a head]
  std::atomic<bool> out_of_memory{false};

  char* state(int64_t number) const {
    const auto begin = (reinterpret_cast<uintptr_t>(states.get()) + 63) / 64 * 64;
    return reinterpret_cast<char*>(begin) + number * state_bytes;
  }
};

// `own_states`, `own_bytes` each, hold the states if a KV head reads only one chunk.
bool decode(Computation& computation, WorkItem& item, char* own_states, int64_t own_bytes) {
  const DtypeKernels& kernels = computation.kernels;
  Task& task = item.task;
  const bool is_alone = item.chunks == 1;
  task.state = is_alone ? own_states : computation.state(item.state);
  task.state_head_stride = is_alone ? own_bytes : item.chunks * computation.state_bytes;
  const auto attend = item.driver == Driver::decode ? kernels.decode : kernels.decode_tiles;
  if (!attend(task)) return false;
  if (is_alone) {
    kernels.decode_finish(task, 1, 0);
    return true;
  }
  const int64_t first_state = item.state - item.chunk;
  std::atomic<int64_t>& done = computation.chunks_done[static_cast<size_t>(first_state)];
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == item.chunks) {
    task.state = computation.state(first_state);
    kernels.decode_finish(task, item.chunks, computation.state_bytes);
  }
  return true;
}

bool compute(void* context, int64_t number, StopCheck& stop) {
  auto& computation = *static_cast<Computation*>(context);
  const DtypeKernels& kernels = computation.kernels;
  WorkItem item = computation.plan.item(number);
  Task& task = item.task;
  const int64_t rows = task.heads * task.queries;
  const int64_t scratch_bytes = [&] {
    switch (item.driver) {
      case Driver::prefill:
        return kernels.prefill_scratch_bytes(rows, task.head_dim, task.value_dim);
      case Driver::decode:
        return kernels.decode_scratch_bytes(task);
      case Driver::decode_tiles:
        return kernels.decode_tiles_scratch_bytes(task);
      case Driver::small_heads:
        return kernels.small_scratch_bytes(task.head_dim, task.value_dim);
      case Driver::stage:
        break;
    }
    return kernels.stage_scratch_bytes(task.head_dim);
  }();
  const int64_t state_bytes = decodes(item.driver) && item.chunks == 1
                                  ? kernels.decode_state_bytes(rows, task.value_dim)
                                  : 0;
  const ThreadScratch scratch(scratch_bytes + task.kv_heads * state_bytes);
  if (!scratch.data()) {
    computation.out_of_memory.store(true, std::memory_order_relaxed);
    return false;
  }
  task.scratch = scratch.data();
  task.should_stop = stop_requested;
  task.stop_context = &stop;
  switch (item.driver) {
    case Driver::prefill:
      return kernels.prefill(task);
    case Driver::small_heads:
      return kernels.attend_small(task);
    case Driver::stage:
      return kernels.run_stage(task);
    case Driver::decode:
    case Driver::decode_tiles:
      break;
  }
  return decode(computation, item, static_cast<char*>(scratch.data()) + scratch_bytes, state_bytes);
}

// Writes `count` scalars, floats or doubles, `stride` bytes apart.
void fill(char* to, int64_t stride, int64_t count, double value, bool is_double) {
  const auto single = static_cast<float>(value);
  for (int64_t i = 0; i < count; ++i, to += stride) {
    if (is_double) {
      std::memcpy(to, &value, sizeof(value));
    } else {
      std::memcpy(to, &single, sizeof(single));
    }
  }
}

// Fills the results of queries beyond q_lengths, which no work item computes.
void fill_padding(const Problem& problem) {
  const bool is_double = problem.dtype == Dtype::float64;
  const bool is_attention = problem.stage == Stage::attention;
  const int64_t columns = is_attention ? problem.value_dim : problem.key_length;
  const auto size =
      static_cast<size_t>(problem.out_is_float32 ? sizeof(float) : bytes_of(problem.dtype));
  const auto write = [&](const Array& out, const Array& lse, int64_t head, int64_t query) {
    char* const row = address(out, head, query);
    for (int64_t i = 0; is_attention && i < columns; ++i) {
      std::memset(row + i * out.column_stride, 0, size);
    }
    const double of_pairs = problem.stage == Stage::logits ? -INFINITY : 0.0;
    if (!is_attention) fill(row, out.column_stride, columns, of_pairs, is_double);
    if (lse.data) fill(address(lse, head, query), 0, 1, -INFINITY, is_double);
  };
  const int64_t batch_items = count_batch_items(problem.batch_axes, problem.batch_shape);
  for (int64_t batch_item = 0; batch_item < batch_items; ++batch_item) {
    Array out = problem.out, lse = problem.lse;
    out.data +=
        batch_offset(problem.batch_axes, problem.batch_shape, out.batch_strides, batch_item);
    if (lse.data) {
      lse.data +=
          batch_offset(problem.batch_axes, problem.batch_shape, lse.batch_strides, batch_item);
    }
    for (int64_t head = 0; head < problem.query_heads; ++head) {
      for (int64_t query = problem.q_lengths[batch_item]; query < problem.query_length; ++query) {
        write(out, lse, head, query);
      }
    }
  }
}

Status attention_of_some(const Problem& problem, const Execution& execution) {
  const DtypeKernels& kernels = active_level().kernels.of(problem.dtype);
  std::optional<BlockKinds> block_kinds;
  const bool has_full_mask = problem.options.mask.data && problem.options.tail_mask_keys < 0;
  if (has_full_mask && !Plan::has_no_prefill(problem, kernels)) {
    block_kinds.emplace(problem, kernels.queries_per_tile, kernels.keys_per_block);
    if (!block_kinds->classify_all(execution)) return Status::interrupted;
  }
  const Plan plan(problem, kernels, block_kinds ? &*block_kinds : nullptr, execution.num_threads);
  Computation computation(plan, kernels);
  if (plan.states() > 0) {
    computation.state_bytes = kernels.decode_state_bytes(plan.max_decode_rows(), problem.value_dim);
    if (plan.states() > INT64_MAX / 2 / computation.state_bytes) return Status::out_of_memory;
    computation.states = std::make_unique_for_overwrite<char[]>(
        static_cast<size_t>(plan.states() * computation.state_bytes + 63));
    computation.chunks_done =
        std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(plan.states()));
  }
  const bool done =
      run({compute, &computation, plan.items(), plan.threads(), execution.interrupted});
  if (done) return Status::done;
  return computation.out_of_memory ? Status::out_of_memory : Status::interrupted;
}

}  // namespace

Status attention(const Problem& problem, const Execution& execution) try {
  bool empty = problem.query_heads == 0 || problem.query_length == 0;
  for (int axis = 0; axis < problem.batch_axes; ++axis) empty |= problem.batch_shape[axis] == 0;
  if (empty) return Status::done;
  const Stage stage = problem.stage;
  const bool has_rows =
      stage == Stage::attention || stage == Stage::logits || stage == Stage::weights;
  if (problem.q_lengths && has_rows) fill_padding(problem);
  return problem.batch_axes == 0 ? attention_of_some(problem, execution)
                                 : attention_of_some(with_fewer_axes(problem), execution);
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
} catch (const std::length_error&) {
  return Status::out_of_memory;
}

}  // namespace numattn
