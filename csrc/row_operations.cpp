#include "row_operations.h"

#include <algorithm>

#include "plan/index.h"
#include "runtime/dispatch.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

// Enough for a thread to be worth waking, few enough for the threads to end together.
constexpr int64_t kElementsPerItem = 1 << 15;

int64_t rows_per_item(int64_t elements_of_a_row) {
  return std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, elements_of_a_row));
}

struct SoftmaxJob {
  const RowSoftmax& problem;
  const DtypeKernels& kernels;
  int64_t element_bytes, rows_per_item;
};

bool softmax_item(void* context, int64_t item, StopCheck&) {
  const auto& [problem, kernels, bytes, step] = *static_cast<const SoftmaxJob*>(context);
  const int64_t row = item * step;
  const int64_t offset = row * problem.columns;
  kernels.softmax_rows(problem.scores + offset * bytes,
                       problem.mask ? problem.mask + offset : nullptr, problem.out + offset * bytes,
                       std::min(step, problem.rows - row), problem.columns);
  return true;
}

struct RotationJob {
  const Rotation& problem;
  const DtypeKernels& kernels;
  int64_t items_per_head, rows_per_item;
};

bool rotate_item(void* context, int64_t item, StopCheck&) {
  const auto& job = *static_cast<const RotationJob*>(context);
  const Rotation& problem = job.problem;
  // The heads of the same rows follow each other, and find their angles in the cache.
  const int64_t head = item % problem.heads;
  const int64_t row = item / problem.heads % job.items_per_head * job.rows_per_item;
  const int64_t batch_item = item / problem.heads / job.items_per_head;
  const auto at = [&](const Array& array) {
    return View{address(array, head, row) + batch_offset(problem.batch_axes, problem.batch_shape,
                                                         array.batch_strides, batch_item),
                0, array.row_stride, array.column_stride};
  };
  job.kernels.rotate_rows({at(problem.x), at(problem.out), at(problem.cos).data,
                           at(problem.sin).data, problem.cos.row_stride,
                           std::min(job.rows_per_item, problem.length - row), problem.dim,
                           problem.rotary_dim, problem.interleaved});
  return true;
}

Status status_of(bool done) { return done ? Status::done : Status::interrupted; }

int threads_for(int64_t items, const Execution& execution) {
  return static_cast<int>(std::clamp<int64_t>(items, 1, execution.num_threads));
}

}  // namespace

Status softmax(const RowSoftmax& problem, const Execution& execution) {
  if (problem.rows == 0 || problem.columns == 0) return Status::done;
  SoftmaxJob job{problem, active_level().kernels.of(problem.dtype), bytes_of(problem.dtype),
                 rows_per_item(problem.columns)};
  const int64_t items = quotient_up(problem.rows, job.rows_per_item);
  return status_of(
      run({softmax_item, &job, items, threads_for(items, execution), execution.interrupted}));
}

Status rotate(const Rotation& problem, const Execution& execution) {
  const int64_t slices = problem.heads * count_batch_items(problem.batch_axes, problem.batch_shape);
  if (slices == 0 || problem.length == 0) return Status::done;
  RotationJob job{problem, active_level().kernels.of(problem.dtype), 0, rows_per_item(problem.dim)};
  job.items_per_head = quotient_up(problem.length, job.rows_per_item);
  const int64_t items = slices * job.items_per_head;
  return status_of(
      run({rotate_item, &job, items, threads_for(items, execution), execution.interrupted}));
}

}  // namespace numattn
