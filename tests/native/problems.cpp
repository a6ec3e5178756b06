#include "problems.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using numattn::Dtype;
using numattn::Stage;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

#if defined(__aarch64__)
using Float16 = __fp16;  // GCC 12 has no _Float16 on this architecture
#else
using Float16 = _Float16;
#endif

}  // namespace

size_t size_of(Kind kind) {
  switch (kind) {
    case Kind::float64:
      return 8;
    case Kind::float32:
      return 4;
    case Kind::float16:
    case Kind::bfloat16:
      return 2;
    default:
      return 1;
  }
}

void store(Kind kind, char* to, double x) {
  const auto single = static_cast<float>(x);
  if (kind == Kind::float64) {
    std::memcpy(to, &x, 8);
  } else if (kind == Kind::float32) {
    std::memcpy(to, &single, 4);
  } else if (kind == Kind::float16) {
    const auto half = static_cast<Float16>(single);
    std::memcpy(to, &half, 2);
  } else if (kind == Kind::bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const auto upper = static_cast<uint16_t>(bits >> 16);  // rounded towards 0: good enough here
    std::memcpy(to, &upper, 2);
  } else {
    *to = static_cast<char>(static_cast<int>(x));
  }
}

double load(Kind kind, const char* from) {
  if (kind == Kind::float64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  if (kind == Kind::float32) {
    float x;
    std::memcpy(&x, from, 4);
    return x;
  }
  if (kind == Kind::float16) {
    Float16 x;
    std::memcpy(&x, from, 2);
    return static_cast<float>(x);
  }
  if (kind == Kind::bfloat16) {
    uint16_t upper;
    std::memcpy(&upper, from, 2);
    const uint32_t bits = uint32_t{upper} << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  return static_cast<signed char>(*from);
}

// The distance between neighbouring numbers next to 0, where results have no digits to lose.
// Products of bfloat16 pairs turn subnormal numbers into 0.
double smallest_step(Kind kind) {
  switch (kind) {
    case Kind::float16:
      return std::ldexp(1.0, -24);
    case Kind::bfloat16:
      return std::ldexp(1.0, -126);
    case Kind::float64:
      return std::numeric_limits<double>::denorm_min();
    default:
      return std::numeric_limits<float>::denorm_min();
  }
}

double rounding(Kind kind) {
  return kind == Kind::float64   ? 5e-12
         : kind == Kind::float32 ? 1.5e-4
         : kind == Kind::float16 ? 4e-3
                                 : 1.2e-2;
}

Dtype dtype_of(Kind kind) {
  return kind == Kind::float32   ? Dtype::float32
         : kind == Kind::float64 ? Dtype::float64
         : kind == Kind::float16 ? Dtype::float16
                                 : Dtype::bfloat16;
}

char* Tensor::address(int64_t b, int64_t h, int64_t i, int64_t j) const {
  if (starts) i += starts[b];
  return array.data + b * array.batch_strides[0] + h * array.head_stride + i * array.row_stride +
         j * array.column_stride;
}

double Tensor::value(int64_t b, int64_t h, int64_t i, int64_t j) const {
  if (starts) i += starts[b];
  const int64_t item = starts ? 0 : b;
  return values[static_cast<size_t>(((item * heads + h) * rows + i) * columns + j)];
}

void Tensor::read_values() {
  values.clear();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) values.push_back(stored(b, h, i, j));
      }
    }
  }
}

template <class Number>
Number RandomProblem::one_of(std::initializer_list<Number> numbers) {
  return numbers.begin()[below(static_cast<int64_t>(numbers.size()))];
}
bool RandomProblem::sometimes(double probability) {
  return std::uniform_real_distribution<double>()(random_) < probability;
}
int64_t RandomProblem::below(int64_t end) {
  return std::uniform_int_distribution<int64_t>(0, end - 1)(random_);
}

RandomProblem::RandomProblem(uint64_t seed, bool differentiable)
    : random_(seed), differentiable_(differentiable) {
  draw_sizes();
  draw_options();
  if (problem.stage == Stage::attention && sometimes(0.2)) draw_ragged();
  draw_arrays();
  describe();
}

Tensor RandomProblem::make(Kind kind, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
                           Layout layout, double amplitude) {
  Tensor tensor{kind, batch, heads, rows, columns, {}, nullptr, {}, nullptr};
  const auto size = static_cast<int64_t>(size_of(kind));
  const bool varied = layout != Layout::packed;
  const int64_t gap = varied && sometimes(0.2) ? 1 + below(20) : 0;  // bytes after each row
  const int64_t row_bytes = columns * size + gap;
  const int64_t bytes = batch * heads * rows * row_bytes - (batch * heads * rows > 0 ? gap : 0);
  const int64_t shift = varied && sometimes(0.2) ? 1 : 0;
  const bool at_end = sometimes(0.5);
  memory_.push_back(std::make_unique<GuardedMemory>(static_cast<size_t>(bytes + shift), at_end));
  tensor.memory = memory_.back().get();
  std::memset(tensor.memory->data(), 0xff, static_cast<size_t>(bytes + shift));  // NaN
  numattn::Array& array = tensor.array;
  // The shift leaves the first or the last byte directly at the protected page.
  array.data = tensor.memory->data() + (at_end ? 0 : shift);
  array.column_stride = size;
  const bool heads_first = layout != Layout::rows_first;
  array.row_stride = row_bytes * (heads_first ? 1 : heads);
  array.head_stride = row_bytes * (heads_first ? rows : 1);
  array.batch_strides[0] = heads * rows * row_bytes;
  if (varied && rows > 0 && sometimes(0.1)) {
    array.data += (rows - 1) * array.row_stride;
    array.row_stride = -array.row_stride;
  }
  std::normal_distribution<double> normal;
  for (int64_t b = 0; amplitude != 0 && b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          store(kind, tensor.address(b, h, i, j),
                kind == Kind::int8   ? static_cast<double>(below(255) - 127)
                : kind == Kind::byte ? static_cast<double>(sometimes(0.7))
                                     : amplitude * normal(random_));
        }
      }
    }
  }
  tensor.read_values();
  return tensor;
}

void RandomProblem::broadcast(Tensor& tensor) {
  if (sometimes(0.3)) tensor.array.batch_strides[0] = 0;
  if (sometimes(0.3)) tensor.array.head_stride = 0;
  tensor.read_values();
}

void RandomProblem::draw_mask_blocks() {
  numattn::MaskBlocks& blocks = problem.options.mask_blocks;
  blocks.queries = one_of<int64_t>({1, 3, 8, 16, 64, 100});
  blocks.keys = one_of<int64_t>({1, 5, 8, 32, 64, 96, 128});
  const int64_t lq = problem.query_length, lk = problem.key_length;
  const int64_t rows = (lq + blocks.queries - 1) / blocks.queries;
  const int64_t columns = (lk + blocks.keys - 1) / blocks.keys;
  const int64_t bytes_per_row = (blocks.keys + 7) / 8;
  std::vector<int32_t> numbers;
  std::vector<uint8_t> bits;
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t h = 0; h < problem.query_heads; ++h) {
      for (int64_t block = 0; block < rows * columns; ++block) {
        const int64_t first_query = block / columns * blocks.queries;
        const int64_t first_key = block % columns * blocks.keys;
        const int64_t queries = std::min(blocks.queries, lq - first_query);
        const int64_t keys = std::min(blocks.keys, lk - first_key);
        const int64_t kind = below(4);
        std::vector<uint8_t> of_block(static_cast<size_t>(blocks.queries * bytes_per_row));
        int64_t set = 0;
        for (int64_t pair = 0; pair < queries * keys; ++pair) {
          const int64_t i = pair / keys, j = pair % keys;
          char* const at = mask_.address(b, h, first_query + i, first_key + j);
          if (kind < 2) *at = static_cast<char>(kind);
          if (*at) of_block[static_cast<size_t>(i * bytes_per_row + j / 8)] |= 1 << j % 8;
          set += *at != 0;
        }
        const bool is_mixed = set > 0 && set < queries * keys;
        numbers.push_back(is_mixed  ? static_cast<int32_t>(bits.size() / of_block.size())
                          : set > 0 ? numattn::MaskBlocks::kFull
                                    : numattn::MaskBlocks::kEmpty);
        if (is_mixed) bits.insert(bits.end(), of_block.begin(), of_block.end());
      }
      // If the mask is broadcast, the other heads share it: write it only once.
      if (mask_.array.head_stride == 0) break;
    }
    if (mask_.array.batch_strides[0] == 0) break;
  }
  mask_.read_values();
  const auto keep = [&](const void* from, size_t size) {
    memory_.push_back(std::make_unique<GuardedMemory>(size, true));
    if (size > 0) std::memcpy(memory_.back()->data(), from, size);
    return memory_.back()->data();
  };
  numattn::View& mask = problem.options.mask;
  mask = {};
  mask.data = keep(numbers.data(), numbers.size() * sizeof(int32_t));
  const auto bytes = static_cast<int64_t>(sizeof(int32_t));
  mask.head_stride = mask_.array.head_stride == 0 ? 0 : rows * columns * bytes;
  const int64_t heads = mask_.array.head_stride == 0 ? 1 : problem.query_heads;
  problem.mask_batch_strides[0] =
      mask_.array.batch_strides[0] == 0 ? 0 : heads * rows * columns * bytes;
  blocks.row_stride = columns * bytes;
  blocks.bits = reinterpret_cast<const uint8_t*>(keep(bits.data(), bits.size()));
}

void RandomProblem::draw_sizes() {
  const auto length = [&] {
    return one_of<int64_t>({1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130});
  };
  const auto dim = [&] { return one_of<int64_t>({1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 80}); };
  kind_ = one_of({Kind::float32, Kind::float32, Kind::float64, Kind::float16, Kind::bfloat16});
  precision_ = kind_ == Kind::float64 ? Kind::float64 : Kind::float32;
  problem.dtype = dtype_of(kind_);
  batch_ = 1 + below(2);
  problem.batch_axes = 1;
  problem.batch_shape[0] = batch_;
  problem.kv_heads = 1 + below(4);
  group_ = one_of<int64_t>({1, 1, 2, 4, 7, 20});
  problem.query_heads = problem.kv_heads * group_;
  problem.query_length = sometimes(0.3) ? 1 + below(4) : length();
  problem.key_length = sometimes(0.15) ? one_of<int64_t>({192, 193, 400, 1537, 3100}) : length();
  problem.head_dim = dim();
  problem.value_dim = dim();
  k_kind_ = v_kind_ = kind_;
  if (!differentiable_) {
    if (sometimes(0.2)) problem.stage = one_of({Stage::logits, Stage::weights, Stage::received});
    if (sometimes(0.15)) k_kind_ = Kind::int8;
    if (sometimes(0.15)) v_kind_ = Kind::int8;
  }
  num_threads = 1 + static_cast<int>(below(3));
}

void RandomProblem::draw_options() {
  const auto per_head = [&](std::vector<double>& numbers) {
    for (int64_t h = 0; h < problem.query_heads; ++h) {
      numbers.push_back(static_cast<double>(below(100)) / 50);
    }
    return numbers.data();
  };
  problem.options.scale =
      sometimes(0.2) ? -0.7 : 1 / std::sqrt(static_cast<double>(problem.head_dim));
  if (sometimes(0.2)) problem.options.softcap = 3;
  if (sometimes(0.2)) problem.options.alibi_slopes = per_head(slopes_);
  if (sometimes(0.2) && problem.stage != Stage::logits) problem.options.sinks = per_head(sinks_);
  if (sometimes(0.3)) problem.options.window_right = sometimes(0.7) ? 0 : below(40);
  if (sometimes(0.2)) problem.options.window_left = below(100);
  if (sometimes(differentiable_ ? 0.3 : 0.1) && problem.stage == Stage::attention) {
    problem.options.dropout = one_of({0.1, 0.25, 0.9});
    problem.options.dropout_seed = random_();
  }
  for (int64_t b = 0; b < batch_; ++b) {
    kv_lengths_.push_back(below(problem.key_length + 1));
    q_offset_.push_back(below(2 * problem.key_length) - problem.key_length / 2);
    q_lengths_.push_back(below(problem.query_length + 1));
  }
  if (sometimes(0.3)) problem.kv_lengths = kv_lengths_.data();
  if (sometimes(0.3)) problem.q_offset = q_offset_.data();
  if (sometimes(0.3)) problem.q_lengths = q_lengths_.data();
}

// Draws the lengths of each sequence. query_length and key_length become the total numbers of rows.
void RandomProblem::draw_ragged() {
  batch_ = problem.batch_shape[0] = 1 + below(5);
  const auto starts = [&](int64_t length) {
    std::vector<int64_t> result{0};
    while (static_cast<int64_t>(result.size()) <= batch_) {
      result.push_back(result.back() + (sometimes(0.2) ? below(2) : below(length + 1)));
    }
    return result;
  };
  query_starts_ = starts(problem.query_length);
  key_starts_ = starts(problem.key_length);
  problem.query_starts = query_starts_.data();
  problem.key_starts = key_starts_.data();
  problem.query_length = query_starts_.back();
  problem.key_length = key_starts_.back();
  problem.kv_lengths = nullptr;
  problem.q_lengths = nullptr;
  q_offset_.clear();
  for (int64_t b = 0; b < batch_; ++b) q_offset_.push_back(below(100) - 30);
  if (problem.q_offset) problem.q_offset = q_offset_.data();
}

Tensor RandomProblem::make_rows(Kind kind, const int64_t* starts, int64_t heads, int64_t rows,
                                int64_t columns, Layout layout, double amplitude) {
  Tensor tensor = make(kind, starts ? 1 : batch_, heads, rows, columns, layout, amplitude);
  tensor.starts = starts;
  if (starts) tensor.array.batch_strides[0] = 0;
  return tensor;
}

void RandomProblem::draw_arrays() {
  const auto layout = [&] { return sometimes(0.5) ? Layout::heads_first : Layout::rows_first; };
  const int64_t lq = problem.query_length, lk = problem.key_length;
  const Layout of_keys = layout();
  const bool ragged = problem.query_starts != nullptr;
  const auto make_keys = [&](Kind kind, int64_t columns, double amplitude) {
    return make_rows(kind, problem.key_starts, problem.kv_heads, lk, columns, of_keys, amplitude);
  };
  q_ = make_rows(kind_, problem.query_starts, problem.query_heads, lq, problem.head_dim, layout(),
                 1);
  k_ = make_keys(k_kind_, problem.head_dim, 1);
  v_ = make_keys(v_kind_, problem.value_dim, 1);
  k_scales_ = make_keys(Kind::float32, 1, 0.01);
  v_scales_ = make_keys(Kind::float32, 1, 0.01);
  const bool may_be_paged = problem.stage == Stage::attention && !ragged && !differentiable_;
  if (may_be_paged && sometimes(0.2)) draw_pages(of_keys);
  problem.q = q_.array;
  problem.k = k_.array;
  problem.v = v_.array;
  problem.k_is_int8 = k_kind_ == Kind::int8;
  problem.v_is_int8 = v_kind_ == Kind::int8;
  if (problem.k_is_int8) problem.k_scales = k_scales_.array;
  if (problem.v_is_int8) problem.v_scales = v_scales_.array;
  const bool has_matrices = !ragged && !problem.block_table;
  if (has_matrices && sometimes(0.2)) {
    mask_ = make(Kind::byte, batch_, problem.query_heads, lq, lk, Layout::heads_first, 1);
    broadcast(mask_);
    problem.options.mask = mask_.array;
    problem.mask_batch_strides[0] = mask_.array.batch_strides[0];
    if (sometimes(0.5)) draw_mask_blocks();
  } else if (sometimes(0.2)) {
    problem.options.tail_mask_keys = 1 + below(lk < 150 ? lk + 1 : 150);
    mask_ = make_rows(Kind::byte, problem.query_starts, problem.query_heads, lq,
                      problem.options.tail_mask_keys, layout(), 1);
    if (!ragged) broadcast(mask_);
    problem.options.mask = mask_.array;
    problem.mask_batch_strides[0] = mask_.array.batch_strides[0];
  }
  if (has_matrices && sometimes(0.2)) {
    problem.options.bias_is_float32 = sometimes(0.5);
    bias_ = make(problem.options.bias_is_float32 ? Kind::float32 : kind_, batch_,
                 problem.query_heads, lq, lk, Layout::heads_first, 1);
    broadcast(bias_);
    problem.options.bias = bias_.array;
    problem.bias_batch_strides[0] = bias_.array.batch_strides[0];
  }
  if (problem.stage == Stage::attention) {
    const auto make_output = [&](Kind kind, int64_t columns, Layout layout) {
      return make_rows(kind, problem.query_starts, problem.query_heads, lq, columns, layout, 0);
    };
    problem.out_is_float32 = size_of(kind_) == 2 && sometimes(0.3);
    out_ = make_output(problem.out_is_float32 ? Kind::float32 : kind_, problem.value_dim, layout());
    lse_ = make_output(precision_, 1, Layout::heads_first);
    problem.lse = lse_.array;
  } else if (problem.stage == Stage::received) {
    out_ = make(precision_, batch_, problem.query_heads, lk, 1, Layout::heads_first, 0);
    maximum_ = make(precision_, batch_, problem.query_heads, lq, 1, Layout::packed, 0);
    sum_ = make(precision_, batch_, problem.query_heads, lq, 1, Layout::packed, 0);
    problem.maximum = maximum_.array.data;
    problem.sum = sum_.array.data;
  } else {
    out_ = make(precision_, batch_, problem.query_heads, lq, lk, Layout::heads_first, 0);
  }
  problem.out = out_.array;
}

// Puts K, V and their scales into pages in random order. Memory that no sequence uses holds NaN.
void RandomProblem::draw_pages(Layout layout) {
  page_size_ = one_of<int64_t>({1, 3, 16, 50});
  const int64_t per_item = (problem.key_length + page_size_ - 1) / page_size_;
  const int64_t pages = batch_ * per_item;
  for (int64_t page = 0; page < pages; ++page) block_table_.push_back(page);
  std::shuffle(block_table_.begin(), block_table_.end(), random_);
  const auto into_pages = [&](Kind kind, Tensor& x) {
    Tensor paged = make(kind, pages, x.heads, page_size_, x.columns, layout, 0);
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < x.heads; ++h) {
        for (int64_t i = 0; i < x.rows; ++i) {
          const int64_t page = block_table_[static_cast<size_t>(b * per_item + i / page_size_)];
          for (int64_t j = 0; j < x.columns; ++j) {
            store(kind, paged.address(page, h, i % page_size_, j), x.value(b, h, i, j));
          }
        }
      }
    }
    x.array = paged.array;
    x.array.page_stride = paged.array.batch_strides[0];
    x.array.batch_strides[0] = 0;
  };
  into_pages(k_kind_, k_);
  into_pages(v_kind_, v_);
  into_pages(Kind::float32, k_scales_);
  into_pages(Kind::float32, v_scales_);
  problem.block_table = block_table_.data();
  problem.pages_per_item = per_item;
  problem.page_size = page_size_;
}

void RandomProblem::describe() {
  const auto add = [&](const char* name, auto value) {
    description += std::string(" ") + name + "=" + std::to_string(value);
  };
  add("dtype", static_cast<int>(problem.dtype));
  add("stage", static_cast<int>(problem.stage));
  add("batch", batch_);
  add("query_heads", problem.query_heads);
  add("kv_heads", problem.kv_heads);
  add("query_length", problem.query_length);
  add("key_length", problem.key_length);
  add("head_dim", problem.head_dim);
  add("value_dim", problem.value_dim);
  add("threads", num_threads);
  add("page_size", page_size_);
  add("scale", problem.options.scale);
  add("softcap", problem.options.softcap);
  add("dropout", problem.options.dropout);
  if (problem.options.window_left != numattn::kUnbounded)
    add("window_left", problem.options.window_left);
  if (problem.options.window_right != numattn::kUnbounded)
    add("window_right", problem.options.window_right);
  for (const auto& [name, is_there] : {std::pair{"alibi", problem.options.alibi_slopes != nullptr},
                                       {"sinks", problem.options.sinks != nullptr},
                                       {"kv_lengths", problem.kv_lengths != nullptr},
                                       {"q_lengths", problem.q_lengths != nullptr},
                                       {"ragged", problem.query_starts != nullptr},
                                       {"q_offset", problem.q_offset != nullptr},
                                       {"mask", problem.options.mask.data != nullptr},
                                       {"blocks", problem.options.mask_blocks.queries > 0},
                                       {"tail", problem.options.tail_mask_keys >= 0},
                                       {"bias", problem.options.bias.data != nullptr},
                                       {"int8_k", problem.k_is_int8},
                                       {"int8_v", problem.v_is_int8}}) {
    if (is_there) description += std::string(" ") + name;
  }
}

void RandomProblem::forget_outputs() const {
  for (const Tensor* const output : {&out_, &lse_, &maximum_, &sum_}) {
    if (output->memory) std::memset(output->memory->data(), 0xff, output->memory->bytes());
  }
}

numattn::Status RandomProblem::run() const {
  forget_outputs();
  if (problem.stage == Stage::received) {
    numattn::Problem first = problem;
    first.stage = Stage::statistics;
    const numattn::Status status = numattn::attention(first, {num_threads, nullptr});
    if (status != numattn::Status::done) return status;
  }
  return numattn::attention(problem, {num_threads, nullptr});
}

int64_t RandomProblem::queries(int64_t b) const {
  const int64_t* const starts = problem.query_starts;
  return starts ? starts[b + 1] - starts[b] : problem.query_length;
}

int64_t RandomProblem::keys(int64_t b) const {
  const int64_t* const starts = problem.key_starts;
  if (starts) return starts[b + 1] - starts[b];
  return problem.kv_lengths ? problem.kv_lengths[b] : problem.key_length;
}

std::vector<double> RandomProblem::logits(int64_t b, int64_t h, int64_t i) const {
  const int64_t valid = keys(b);
  const int64_t valid_queries = problem.q_lengths ? problem.q_lengths[b] : queries(b);
  const int64_t p = i + (problem.q_offset ? problem.q_offset[b] : valid - valid_queries);
  const int64_t rows = problem.key_starts ? valid : problem.key_length;
  std::vector<double> result(static_cast<size_t>(rows), -kInfinity);
  for (int64_t j = 0; j < valid && i < valid_queries; ++j) {
    const int64_t tail = problem.options.tail_mask_keys;
    const int64_t column = tail < 0 ? j : j - (valid - tail);
    const bool attends =
        j >= p - problem.options.window_left && j <= p + problem.options.window_right &&
        (!problem.options.mask.data || column < 0 || mask_.value(b, h, i, column) != 0);
    if (!attends) continue;
    double s = 0;
    for (int64_t d = 0; d < problem.head_dim; ++d) {
      s += q_.value(b, h, i, d) * k_.value(b, h / group_, j, d);
    }
    if (problem.k_is_int8) s *= k_scales_.value(b, h / group_, j, 0);
    s *= problem.options.scale;
    if (problem.options.softcap > 0)
      s = problem.options.softcap * std::tanh(s / problem.options.softcap);
    if (problem.options.bias.data) s += bias_.value(b, h, i, j);
    if (problem.options.alibi_slopes) {
      s -= slopes_[static_cast<size_t>(h)] * static_cast<double>(std::abs(p - j));
    }
    result[static_cast<size_t>(j)] = s;
  }
  return result;
}

// Word j % 4 of Philox4x32-10 at (j / 4, query, head, batch item).
double RandomProblem::dropout_factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
  const double dropout = problem.options.dropout;
  if (dropout == 0) return 1;
  uint32_t x[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
                   static_cast<uint32_t>(b)};
  const uint64_t seed = problem.options.dropout_seed;
  auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9, high += 0xBB67AE85) {
    const uint64_t first = uint64_t{0xD2511F53} * x[0], second = uint64_t{0xCD9E8D57} * x[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(second >> 32) ^ x[1] ^ low, static_cast<uint32_t>(second),
        static_cast<uint32_t>(first >> 32) ^ x[3] ^ high, static_cast<uint32_t>(first)};
    std::copy_n(next, 4, x);
  }
  const bool is_dropped = x[j % 4] < static_cast<uint32_t>(std::ldexp(dropout, 32));
  return is_dropped ? 0 : 1 / (1 - dropout);
}

double RandomProblem::error_share() const {
  double largest = 0;
  const auto compare = [&](double actual, double expected, double size) {
    if (std::isinf(expected) ? actual == expected : std::abs(actual - expected) == 0) return;
    // Each weight may be so small that it was rounded to a multiple of this step.
    const auto steps = static_cast<double>(std::max<int64_t>(problem.key_length, 1));
    if (std::abs(actual - expected) <= steps * smallest_step(kind_)) return;
    const double share = std::abs(actual - expected) / (rounding(kind_) * size);
    largest = std::max(largest, share >= 0 ? share : kInfinity);  // NaN fails the test
  };
  const auto largest_of = [](const std::vector<double>& numbers) {
    return numbers.empty() ? 0 : *std::max_element(numbers.begin(), numbers.end());
  };
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t h = 0; h < problem.query_heads; ++h) {
      std::vector<double> received(static_cast<size_t>(problem.key_length), 0);
      for (int64_t i = 0; i < queries(b); ++i) {
        const std::vector<double> s = logits(b, h, i);
        const bool is_valid = !problem.q_lengths || i < problem.q_lengths[b];
        const double sink =
            problem.options.sinks && is_valid ? sinks_[static_cast<size_t>(h)] : -kInfinity;
        const double maximum = std::max(s.empty() ? -kInfinity : largest_of(s), sink);
        const double base = std::isinf(maximum) ? 0 : maximum;
        double sum = std::exp(sink - base);
        for (const double x : s) sum += std::exp(x - base);
        std::vector<double> weights;
        for (const double x : s) weights.push_back(sum == 0 ? 0 : std::exp(x - base) / sum);
        const double largest_weight = largest_of(weights);
        for (size_t j = 0; j < s.size(); ++j) {
          received[j] += weights[j];
          const auto key = static_cast<int64_t>(j);
          if (problem.stage == Stage::logits) {
            compare(out_.stored(b, h, i, key), s[j], std::max(1.0, std::abs(s[j])));
          } else if (problem.stage == Stage::weights) {
            compare(out_.stored(b, h, i, key), weights[j], largest_weight);
          }
        }
        if (problem.stage != Stage::attention) continue;
        const double lse = sum == 0 ? -kInfinity : base + std::log(sum);
        compare(lse_.stored(b, h, i, 0), lse, std::max(1.0, std::abs(lse)));
        for (int64_t d = 0; d < problem.value_dim; ++d) {
          double expected = 0, size = 0;
          for (size_t j = 0; j < s.size(); ++j) {
            const auto key = static_cast<int64_t>(j);
            const double scale = problem.v_is_int8 ? v_scales_.value(b, h / group_, key, 0) : 1;
            const double summand =
                weights[j] * v_.value(b, h / group_, key, d) * scale * dropout_factor(b, h, i, key);
            expected += summand;
            size += std::abs(summand);
          }
          compare(out_.stored(b, h, i, d), expected, size);
        }
      }
      const double most_received = largest_of(received);
      for (int64_t j = 0; problem.stage == Stage::received && j < problem.key_length; ++j) {
        compare(out_.stored(b, h, j, 0), received[static_cast<size_t>(j)], most_received);
      }
    }
  }
  return largest;
}

std::vector<char> RandomProblem::result() const {
  std::vector<char> bytes;
  for (const Tensor* const output : {&out_, &lse_}) {
    if (!output->memory) continue;
    const char* const data = output->memory->data();
    bytes.insert(bytes.end(), data, data + output->memory->bytes());
  }
  return bytes;
}
