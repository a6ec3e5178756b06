#include "projection.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "plan/index.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace numattn {
namespace {

// With less work, another thread is not worth waking.
constexpr double kFlopsPerThread = 1e6;
// A product of few rows takes as long as reading the weight. Eight rows could be multiplied in that
// time.
constexpr double kFlopsPerElementOfFewRows = 16;
// Enough for the threads to finish at about the same time.
constexpr int64_t kItemsPerThread = 4;
// Smaller items would pack a weight for too few rows, or copy rows for too few columns.
constexpr int64_t kFewestRows = 48, kFewestColumns = 64;

// How a product is divided into work items.
struct Blocks {
  int64_t rows, columns;  // of an item
  int64_t columns_of_items;
  int64_t items_before;
};

struct Computation {
  Dtype dtype;
  const DtypeKernels& kernels;
  const Product* products;
  std::vector<Blocks> blocks;
  std::atomic<bool> out_of_memory{false};
};

ProjectionLimits limits_of(const Product& product, const DtypeKernels& kernels) {
  return kernels.projection_limits(product.rows, product.weight.column_stride);
}

double cost(const Product& product, const DtypeKernels& kernels) {
  return static_cast<double>(product.depth) * static_cast<double>(product.columns) *
         (limits_of(product, kernels).are_few_rows ? kFlopsPerElementOfFewRows
                                                   : 2.0 * static_cast<double>(product.rows));
}

// The size of a part if a length is divided into `parts` of about the same size, a multiple of
// `unit`.
int64_t part(int64_t length, int64_t parts, int64_t unit) {
  return quotient_up(quotient_up(length, parts), unit) * unit;
}

// Blocks are as large as the kernel takes them, or smaller if there would be too few for the
// threads. If a product of few rows `is_shared`, every thread gets a part of it.
Blocks cut(const Product& product, bool is_shared, const DtypeKernels& kernels, int threads) {
  const ProjectionLimits limits = limits_of(product, kernels);
  const int64_t most_column_parts = quotient_up(product.columns, kFewestColumns);
  int64_t row_parts = quotient_up(product.rows, limits.rows);
  int64_t column_parts = quotient_up(product.columns, limits.columns);
  int64_t rows_together = 1;
  if (limits.are_few_rows) {
    // No more parts than that: each reads a piece of every row of the weight, and short pieces are
    // slow to read.
    const int64_t unit = is_shared ? threads : 1;
    column_parts = std::min(quotient_up(column_parts, unit) * unit, most_column_parts);
  } else {
    const int64_t most_row_parts = quotient_up(product.rows, kFewestRows);
    while (threads > 1 && row_parts * column_parts < threads * kItemsPerThread) {
      const bool are_tall = product.rows / row_parts > product.columns / column_parts;
      if (row_parts < most_row_parts && (are_tall || column_parts >= most_column_parts)) {
        row_parts *= 2;
      } else if (column_parts < most_column_parts) {
        column_parts *= 2;
      } else {
        break;
      }
    }
    if (row_parts >= threads) row_parts = quotient_up(row_parts, threads) * threads;
    rows_together = 24;  // register tiles have 4, 6, 8 or 12 rows and at most 64 columns
  }
  const int64_t rows = part(product.rows, row_parts, rows_together);
  int64_t columns = part(product.columns, column_parts, kFewestColumns);
  if (product.rotation.cos) columns = part(columns, 1, product.rotation.head_dim);
  return {rows, columns, quotient_up(product.columns, columns), 0};
}

bool compute(void* context, int64_t number, StopCheck& stop) {
  auto& computation = *static_cast<Computation*>(context);
  const auto after = std::upper_bound(
      computation.blocks.begin(), computation.blocks.end(), number,
      [](int64_t item, const Blocks& blocks) { return item < blocks.items_before; });
  const Blocks& blocks = *(after - 1);
  const Product& product = computation.products[after - 1 - computation.blocks.begin()];
  const int64_t local = number - blocks.items_before;
  const int64_t row = local / blocks.columns_of_items * blocks.rows;
  const int64_t column = local % blocks.columns_of_items * blocks.columns;

  ProjectionTask task{};
  task.x = product.x;
  task.x.data += row * task.x.row_stride;
  task.weight = product.weight;
  task.weight.data += column * task.weight.column_stride;
  task.out = product.out;
  task.out.data += row * task.out.row_stride + column * task.out.column_stride;
  task.out_is_float32 = product.out_is_float32;
  if (product.bias) task.bias = product.bias + column * bytes_of(computation.dtype);
  task.rotation = product.rotation;
  task.rows = std::min(blocks.rows, product.rows - row);
  task.depth = product.depth;
  task.columns = std::min(blocks.columns, product.columns - column);
  task.first_row = row;
  task.should_stop = stop_requested;
  task.stop_context = &stop;
  const ThreadScratch scratch(computation.kernels.projection_scratch_bytes(task));
  if (!scratch.data()) {
    computation.out_of_memory.store(true, std::memory_order_relaxed);
    return false;
  }
  task.scratch = scratch.data();
  return computation.kernels.project(task);
}

}  // namespace

Status multiply(Dtype dtype, const Product* products, int64_t count,
                const Execution& execution) try {
  const DtypeKernels& kernels = active_level().kernels.of(dtype);
  double work = 0;
  for (int64_t i = 0; i < count; ++i) work += cost(products[i], kernels);
  const int threads = static_cast<int>(
      std::clamp(work / kFlopsPerThread, 1.0, static_cast<double>(execution.num_threads)));
  Computation computation{dtype, kernels, products, {}};
  int64_t items = 0;
  // Each thread takes whole products. All threads share the products that are left over, for
  // example one of Q, K and V with two threads.
  const int64_t first_shared = count - count % threads;
  for (int64_t i = 0; i < count; ++i) {
    Blocks blocks = cut(products[i], i >= first_shared, kernels, threads);
    blocks.items_before = items;
    items += quotient_up(products[i].rows, blocks.rows) * blocks.columns_of_items;
    computation.blocks.push_back(blocks);
  }
  if (run({compute, &computation, items, threads, execution.interrupted})) {
    return Status::done;
  }
  return computation.out_of_memory ? Status::out_of_memory : Status::interrupted;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace numattn
