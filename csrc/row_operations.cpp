#include "row_operations.h"

#include <algorithm>

#include "plan/index.h"
#include "runtime/dispatch.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

// Large enough to be worth waking a thread, small enough for the threads to finish at about the
// same time.
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
  // The heads of the same rows are consecutive items, so their angles are in the cache.
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

// A problem, the kernel for a part of it, and the number of elements or rows of a part.
template <class Problem>
struct PartsJob {
  const Problem& problem;
  void (*kernel)(const Problem&);
  int64_t step;
};

char* moved(char* data, int64_t bytes) { return data ? data + bytes : nullptr; }
const char* moved(const char* data, int64_t bytes) { return data ? data + bytes : nullptr; }

void move_to(Activation& part, int64_t bytes) {
  part.a += bytes;
  part.times = moved(part.times, bytes);
  part.out += bytes;
}
void move_to(ActivationGradient& part, int64_t bytes) {
  move_to(static_cast<Activation&>(part), bytes);
  part.d += bytes;
  part.d_a += bytes;
  part.d_times = moved(part.d_times, bytes);
}

template <class Problem>
bool activation_item(void* context, int64_t item, StopCheck&) {
  const auto& [problem, kernel, step] = *static_cast<const PartsJob<Problem>*>(context);
  Problem part = problem;
  part.elements = std::min(step, problem.elements - item * step);
  move_to(part, item * step * bytes_of(problem.dtype));
  kernel(part);
  return true;
}

void move_to(Normalization& part, int64_t bytes, int64_t) {
  part.x += bytes;
  part.add = moved(part.add, bytes);
  part.out += bytes;
}
void move_to(NormalizationGradient& part, int64_t bytes, int64_t item) {
  const int64_t part_bytes = part.columns * (part.dtype == Dtype::float64 ? 8 : 4);
  part.x += bytes;
  part.d += bytes;
  part.weight_parts += item * part_bytes;
  part.bias_parts = moved(part.bias_parts, item * part_bytes);
}

template <class Problem>
bool norm_item(void* context, int64_t item, StopCheck&) {
  const auto& [problem, kernel, step] = *static_cast<const PartsJob<Problem>*>(context);
  Problem part = problem;
  part.rows = std::min(step, problem.rows - item * step);
  move_to(part, item * step * problem.columns * bytes_of(problem.dtype), item);
  kernel(part);
  return true;
}

Status status_of(bool done) { return done ? Status::done : Status::interrupted; }

int threads_for(int64_t items, const Execution& execution) {
  return static_cast<int>(std::clamp<int64_t>(items, 1, execution.num_threads));
}

Status run_items(bool (*item)(void*, int64_t, StopCheck&), void* job, int64_t items,
                 const Execution& execution) {
  if (items == 0) return Status::done;
  return status_of(run({item, job, items, threads_for(items, execution), execution.interrupted}));
}

template <class Problem>
Status run_activation(const Problem& problem, void (*kernel)(const Problem&),
                      const Execution& execution) {
  PartsJob<Problem> job{problem, kernel, kElementsPerItem};
  return run_items(activation_item<Problem>, &job, quotient_up(problem.elements, job.step),
                   execution);
}

template <class Problem>
Status run_norm(const Problem& problem, void (*kernel)(const Problem&),
                const Execution& execution) {
  PartsJob<Problem> job{problem, kernel, rows_per_item(problem.columns)};
  return run_items(norm_item<Problem>, &job, norm_gradient_parts(problem.rows, problem.columns),
                   execution);
}

}  // namespace

Status softmax(const RowSoftmax& problem, const Execution& execution) {
  if (problem.rows == 0 || problem.columns == 0) return Status::done;
  SoftmaxJob job{problem, active_level().kernels.of(problem.dtype), bytes_of(problem.dtype),
                 rows_per_item(problem.columns)};
  const int64_t items = quotient_up(problem.rows, job.rows_per_item);
  return run_items(softmax_item, &job, items, execution);
}

Status rotate(const Rotation& problem, const Execution& execution) {
  const int64_t slices = problem.heads * count_batch_items(problem.batch_axes, problem.batch_shape);
  if (slices == 0 || problem.length == 0) return Status::done;
  RotationJob job{problem, active_level().kernels.of(problem.dtype), 0, rows_per_item(problem.dim)};
  job.items_per_head = quotient_up(problem.length, job.rows_per_item);
  const int64_t items = slices * job.items_per_head;
  return run_items(rotate_item, &job, items, execution);
}

Status activate(const Activation& problem, const Execution& execution) {
  return run_activation(problem, active_level().kernels.of(problem.dtype).activate, execution);
}

Status activate_back(const ActivationGradient& problem, const Execution& execution) {
  return run_activation(problem, active_level().kernels.of(problem.dtype).activate_back, execution);
}

// A part is the sum of one work item's rows. The number of threads does not change it.
int64_t norm_gradient_parts(int64_t rows, int64_t columns) {
  return quotient_up(rows, rows_per_item(columns));
}

Status normalize(const Normalization& problem, const Execution& execution) {
  return run_norm(problem, active_level().kernels.of(problem.dtype).normalize_rows, execution);
}

Status normalize_back(const NormalizationGradient& problem, const Execution& execution) {
  return run_norm(problem, active_level().kernels.of(problem.dtype).normalize_rows_back, execution);
}

}  // namespace numattn
