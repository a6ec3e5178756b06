#include "plan/fewer_axes.h"

#include <algorithm>

namespace numattn {
namespace {

// The strides of one array along the batch axes and the heads.
struct Walk {
  int64_t* batch_strides;
  int64_t* head_stride;
  int64_t heads;
};

// Whether one step of `outer` equals `length` steps of `inner`.
bool continues(int64_t outer, int64_t inner, int64_t length) { return outer == length * inner; }

}  // namespace

Problem with_fewer_axes(const Problem& given) {
  Problem problem = given;
  Walk walks[10];
  int count = 0;
  const auto add = [&](View& view, int64_t* batch_strides, int64_t heads) {
    if (view.data) walks[count++] = {batch_strides, &view.head_stride, heads};
  };
  const auto add_array = [&](Array& array, int64_t heads) {
    add(array, array.batch_strides, heads);
  };
  add_array(problem.q, problem.query_heads);
  add_array(problem.k, problem.kv_heads);
  add_array(problem.v, problem.kv_heads);
  add_array(problem.out, problem.query_heads);
  add_array(problem.lse, problem.query_heads);
  add_array(problem.k_scales, problem.kv_heads);
  add_array(problem.v_scales, problem.kv_heads);
  add(problem.options.mask, problem.mask_batch_strides, problem.query_heads);
  add(problem.options.bias, problem.bias_batch_strides, problem.query_heads);
  const auto all = [&](auto fits) { return std::all_of(walks, walks + count, fits); };

  // Axes of length 1 are dropped: their strides are never used.
  int axes = 0;
  for (int axis = 0; axis < problem.batch_axes; ++axis) {
    if (problem.batch_shape[axis] == 1) continue;
    const int64_t length = problem.batch_shape[axis];
    const bool joins =
        axes > 0 && all([&](const Walk& walk) {
          return continues(walk.batch_strides[axes - 1], walk.batch_strides[axis], length);
        });
    const int to = joins ? axes - 1 : axes++;
    problem.batch_shape[to] = joins ? problem.batch_shape[to] * length : length;
    for (int i = 0; i < count; ++i) {
      walks[i].batch_strides[to] = walks[i].batch_strides[axis];
    }
  }
  problem.batch_axes = axes;

  const bool depends_on_item = problem.query_starts || problem.block_table || problem.q_offset ||
                               problem.kv_lengths || problem.q_lengths;
  const bool depends_on_head =
      problem.options.alibi_slopes || problem.options.sinks || problem.options.dropout > 0;
  if (axes == 0 || depends_on_item || depends_on_head) return problem;
  const int last = axes - 1;
  const bool joins = all([&](const Walk& walk) {
    return walk.heads == 1 || continues(walk.batch_strides[last], *walk.head_stride, walk.heads);
  });
  if (!joins) return problem;
  for (int i = 0; i < count; ++i) {
    if (walks[i].heads == 1) *walks[i].head_stride = walks[i].batch_strides[last];
  }
  problem.query_heads *= problem.batch_shape[last];
  problem.kv_heads *= problem.batch_shape[last];
  problem.batch_axes = last;
  return problem;
}

}  // namespace numattn
