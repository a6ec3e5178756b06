#include "plan/plan.h"

#include <algorithm>

#include "plan/index.h"

namespace numattn {
namespace {

// Work items for each thread, so that no thread waits long for another's last item.
constexpr int64_t kItemsPerThread = 4;
// One or two microseconds of work. Handing work to a thread that spins takes as long.
constexpr double kFlopsPerThread = 5e5;
// The number of flops that take as long as reading a byte of K or V from memory.
constexpr double kFlopsPerByte = 10;
// Group adjacent heads until a key spans 4 KiB: enough for the hardware prefetcher, small enough
// for a turn's keys to stay in the first cache.
constexpr int64_t kBytesOfAdjacentHeads = 4096;
// A limit, because each head needs scratch for its queries and logits.
constexpr int64_t kMostAdjacentHeads = 16;

// The largest divisor that is at most `most`, and at least 1.
int64_t largest_divisor(int64_t number, int64_t most) {
  while (most > 1 && number % most != 0) --most;
  return std::max<int64_t>(most, 1);
}

bool is_small(const Problem& problem, const DtypeKernels& kernels, int64_t queries, int64_t keys) {
  return !problem.k_is_int8 && !problem.v_is_int8 && !problem.out_is_float32 &&
         queries <= kernels.max_small_queries && keys <= kernels.max_small_keys;
}

}  // namespace

bool Plan::has_no_prefill(const Problem& problem, const DtypeKernels& kernels) {
  if (problem.stage != Stage::attention) return true;
  return problem.options.dropout == 0 &&
         (problem.query_length <= kernels.max_decode_queries ||
          is_small(problem, kernels, problem.query_length, problem.key_length));
}

Driver Plan::driver(const Sequence& sequence) const {
  if (problem_.stage != Stage::attention) return Driver::stage;
  if (problem_.options.dropout > 0) return Driver::prefill;
  if (is_small(problem_, kernels_, sequence.queries, sequence.valid_keys)) {
    return Driver::small_heads;
  }
  if (group() * sequence.queries <= kernels_.max_decode_rows) return Driver::decode;
  return sequence.queries <= kernels_.max_decode_queries ? Driver::decode_tiles : Driver::prefill;
}

Plan::Plan(const Problem& problem, const DtypeKernels& kernels, const BlockKinds* block_kinds,
           int num_threads)
    : problem_(problem), kernels_(kernels), block_kinds_(block_kinds), sequences_(problem) {
  const bool all_alike = sequences_.are_alike();
  const int64_t batch_items = sequences_.count();
  double work = 0;
  bool any_decodes = false;
  const auto look_at = [&](const Sequence& sequence, double times) {
    work += times * cost(sequence);
    any_decodes |= decodes(driver(sequence));
  };
  if (all_alike) {
    look_at(sequences_[0], static_cast<double>(batch_items));
  } else {
    for (int64_t i = 0; i < batch_items; ++i) look_at(sequences_[i], 1);
  }
  threads_ =
      static_cast<int>(std::clamp(work / kFlopsPerThread, 1.0, static_cast<double>(num_threads)));

  // How many tiles and KV heads a work item has does not change how each is computed. So the number
  // may depend on the threads here without changing a bit of the result.
  tiles_per_item_ = kernels.max_tiles_per_block;
  adjacent_kv_heads_ = any_decodes ? adjacent_kv_heads() : 1;
  small_kv_heads_per_item_ = std::clamp<int64_t>(
      batch_items * problem.kv_heads / (kItemsPerThread * threads_), 1, problem.kv_heads);
  const auto count = [&] {
    Counts all{0, 0};
    before_.clear();
    max_decode_rows_ = 0;
    for (int64_t i = 0; !all_alike && i < batch_items; ++i) {
      before_.push_back(all);
      const Sequence here = sequences_[i];
      const Counts more = counts(here);
      all = {all.items + more.items, all.states + more.states};
      max_decode_rows_ = std::max(max_decode_rows_, decode_rows(here));
    }
    if (all_alike) {
      const Sequence here = sequences_[0];
      const Counts each = counts(here);
      max_decode_rows_ = decode_rows(here);
      all = {batch_items * each.items, batch_items * each.states};
    } else {
      before_.push_back(all);
    }
    items_ = all.items;
    states_ = all.states;
  };
  const auto divide = [&] {
    if (tiles_per_item_ == 1 && adjacent_kv_heads_ == 1) return false;
    tiles_per_item_ = std::max<int64_t>(tiles_per_item_ / 2, 1);
    adjacent_kv_heads_ = largest_divisor(problem.kv_heads, adjacent_kv_heads_ / 2);
    return true;
  };
  for (count(); items_ < kItemsPerThread * threads_ && divide();) count();
  threads_ = static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(items_, 1)));
}

// The number of KV heads that a work item of decode may take. Their rows are adjacent in memory.
int64_t Plan::adjacent_kv_heads() const {
  const View &mask = problem_.options.mask, &bias = problem_.options.bias;
  if ((mask.data && mask.head_stride != 0) || (bias.data && bias.head_stride != 0)) return 1;
  int64_t most = std::min(problem_.kv_heads, kMostAdjacentHeads);
  const auto look_at = [&](const Array& array, bool is_int8, int64_t dims) {
    const int64_t element = is_int8 ? 1 : bytes_of(problem_.dtype);
    const bool is_adjacent = array.column_stride == element &&
                             array.head_stride == dims * element &&
                             array.row_stride >= problem_.kv_heads * array.head_stride;
    most = is_adjacent ? std::min(most, kBytesOfAdjacentHeads / array.head_stride) : 1;
  };
  look_at(problem_.k, problem_.k_is_int8, problem_.head_dim);
  if (most > 1) look_at(problem_.v, problem_.v_is_int8, problem_.value_dim);
  return largest_divisor(problem_.kv_heads, most);
}

Plan::Chunks Plan::chunks_read(const Sequence& sequence) const {
  const TileKeys keys = sequences_.keys_of(sequence);
  const int64_t first = keys.begin / kernels_.keys_per_chunk;
  return {first, std::max<int64_t>(1, quotient_up(keys.end, kernels_.keys_per_chunk) - first)};
}

Plan::HeadsPerItem Plan::heads_per_item(const Sequence& sequence) const {
  if (driver(sequence) == Driver::decode) return {adjacent_kv_heads_, group()};
  const int64_t of_tile = kernels_.queries_per_tile / std::max<int64_t>(sequence.queries, 1);
  const int64_t tiles = quotient_up(group(), of_tile);
  if (tiles > tiles_per_item_) return {1, of_tile * tiles_per_item_};
  const int64_t most = std::min(adjacent_kv_heads_, tiles_per_item_ / tiles);
  return {largest_divisor(problem_.kv_heads, most), group()};
}

int64_t Plan::decode_rows(const Sequence& sequence) const {
  if (!decodes(driver(sequence))) return 0;
  return heads_per_item(sequence).query_heads * sequence.queries;
}

Plan::Counts Plan::counts(const Sequence& sequence) const {
  const Driver by = driver(sequence);
  if (problem_.stage == Stage::received) {
    const int64_t chunks =
        std::max<int64_t>(1, quotient_up(sequence.keys, kernels_.keys_per_chunk));
    return {problem_.query_heads * chunks, 0};
  }
  if (by == Driver::prefill || by == Driver::stage) {
    return {problem_.query_heads * quotient_up(sequence.queries, queries_per_item()), 0};
  }
  if (sequence.queries == 0) return {0, 0};
  if (by == Driver::small_heads) {
    return {quotient_up(problem_.kv_heads, small_kv_heads_per_item_), 0};
  }
  const int64_t chunks = chunks_read(sequence).count;
  const HeadsPerItem heads = heads_per_item(sequence);
  const int64_t states = problem_.kv_heads * quotient_up(group(), heads.query_heads) * chunks;
  return {states / heads.kv_heads, chunks > 1 ? states : 0};
}

double Plan::cost(const Sequence& sequence) const {
  const TileKeys attended = sequences_.keys_of(sequence);
  const auto dims = static_cast<double>(problem_.head_dim + problem_.value_dim);
  const auto keys = static_cast<double>(std::max<int64_t>(attended.end - attended.begin, 0));
  const double flops = 2.0 * static_cast<double>(problem_.query_heads * sequence.queries);
  const double bytes = 4.0 * static_cast<double>(problem_.kv_heads);
  return std::max(flops, kFlopsPerByte * bytes) * keys * dims;
}

void Plan::set_prefill(WorkItem& item, const Sequence& sequence, int64_t local) const {
  const int64_t queries_per_item = this->queries_per_item();
  const int64_t blocks = quotient_up(sequence.queries, queries_per_item);
  const int64_t head = local / blocks;
  int64_t block = local % blocks;
  if (last_queries_come_first(problem_.options)) block = blocks - 1 - block;
  const int64_t first = block * queries_per_item;
  Task& task = item.task;
  sequences_.set_arrays(task, sequence, head, 1, first,
                        std::min(queries_per_item, sequence.queries - first));
  sequences_.set_tiles(task, sequence, block_kinds_, head, first, kernels_.queries_per_tile);
}

void Plan::set_decode(WorkItem& item, const Sequence& sequence, int64_t local) const {
  const Chunks read = chunks_read(sequence);
  item.chunks = read.count;
  item.chunk = local % item.chunks;
  const HeadsPerItem heads = heads_per_item(sequence);
  const int64_t parts = quotient_up(group(), heads.query_heads);  // of a KV head
  const int64_t part = local / item.chunks * heads.kv_heads;      // of all KV heads
  item.state = part * item.chunks + item.chunk;
  const int64_t first_head = part % parts * heads.query_heads;
  Task& task = item.task;
  sequences_.set_arrays(task, sequence, part / parts * group() + first_head,
                        std::min(heads.query_heads, group() - first_head), 0, sequence.queries);
  task.kv_heads = heads.kv_heads;
  task.block_kinds = nullptr;
  const int64_t begin = (read.first + item.chunk) * kernels_.keys_per_chunk;
  TileKeys keys = sequences_.keys_of(sequence);
  keys.begin = std::max(keys.begin, begin);
  keys.end = std::min(keys.end, begin + kernels_.keys_per_chunk);
  std::fill_n(task.tile_keys, item.driver == Driver::decode ? 1 : tiles_per_item_, keys);
}

void Plan::set_small(WorkItem& item, const Sequence& sequence, int64_t local) const {
  const int64_t kv_head = local * small_kv_heads_per_item_;
  Task& task = item.task;
  sequences_.set_arrays(task, sequence, kv_head * group(), group(), 0, sequence.queries);
  task.kv_heads = std::min(small_kv_heads_per_item_, problem_.kv_heads - kv_head);
  task.valid_keys = sequence.valid_keys;
}

void Plan::set_stage(WorkItem& item, const Sequence& sequence, int64_t local) const {
  Task& task = item.task;
  const bool by_keys = problem_.stage == Stage::received;
  const int64_t blocks = counts(sequence).items / problem_.query_heads;
  const int64_t head = local / blocks;
  const int64_t block = local % blocks;
  const int64_t first_query = by_keys ? 0 : block * queries_per_item();
  const int64_t queries =
      by_keys ? sequence.queries : std::min(queries_per_item(), sequence.queries - first_query);
  sequences_.set_arrays(task, sequence, head, 1, first_query, queries);
  task.keys_begin = by_keys ? block * kernels_.keys_per_chunk : 0;
  task.keys_end = by_keys
                      ? std::min<int64_t>(task.keys_begin + kernels_.keys_per_chunk, sequence.keys)
                      : sequence.keys;
  task.valid_keys = sequence.valid_keys;
  const int64_t first =
      (sequence.batch_item * problem_.query_heads + head) * problem_.query_length + first_query;
  const int64_t size = problem_.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  task.maximum = problem_.maximum ? problem_.maximum + first * size : nullptr;
  task.sum = problem_.sum ? problem_.sum + first * size : nullptr;
}

WorkItem Plan::item(int64_t number) const {
  int64_t batch_item;
  Counts before;
  if (before_.empty()) {
    const Counts each = counts(sequences_[0]);
    batch_item = number / each.items;
    before = {batch_item * each.items, batch_item * each.states};
  } else {
    const auto after =
        std::upper_bound(before_.begin(), before_.end(), number,
                         [](int64_t n, const Counts& counts) { return n < counts.items; });
    batch_item = after - before_.begin() - 1;
    before = before_[static_cast<size_t>(batch_item)];
  }
  const Sequence here = sequences_[batch_item];
  const int64_t local = number - before.items;
  WorkItem item;
  item.task.stage = problem_.stage;
  item.driver = driver(here);
  switch (item.driver) {
    case Driver::stage:
      set_stage(item, here, local);
      break;
    case Driver::small_heads:
      set_small(item, here, local);
      break;
    case Driver::decode:
    case Driver::decode_tiles:
      set_decode(item, here, local);
      item.state += before.states;
      break;
    case Driver::prefill:
      set_prefill(item, here, local);
      break;
  }
  return item;
}

}  // namespace numattn
