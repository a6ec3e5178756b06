# A fast path for `attention`, without Python code, for calls with the usual kinds of arguments:
# NumPy arrays with the same leading axes, and plain numbers, tuples and lists. It accepts calls but
# never refuses them: if anything is unusual or wrong, it leaves the call to `_arguments`, which
# decides and raises errors. Accepted calls must mean the same there (tests/test_options.py
# compares).

from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.tuple cimport PyTuple_CheckExact
from libc.math cimport INFINITY


cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int*) except? -1


cdef int64_t unbounded = _arguments.UNBOUNDED
cdef int64_t max_position = _arguments.MAX_POSITION
cdef int max_axes = _arguments.MAX_AXES
cdef int64_t max_threads = _checks.MAX_THREADS
# With factors below this value, nothing overflows in float32.
cdef double large_factor = 1e30


cdef struct Shape:
    int ndim
    int batch_axes
    int heads_axis  # -1 for one head
    int rows_axis


cdef inline Shape _shape(int ndim, bint rows_first) noexcept:
    """Return the axes of an array (..., heads, rows, columns) or (..., rows, heads, columns)."""
    cdef Shape shape
    shape.ndim = ndim
    shape.batch_axes = ndim - 3 if ndim > 3 else 0
    shape.heads_axis = -1 if ndim == 2 else ndim - 2 if rows_first else ndim - 3
    shape.rows_axis = ndim - 3 if rows_first and ndim > 2 else ndim - 2
    return shape


cdef inline void _fill_array(Array* to, cnp.ndarray x, Shape shape, bint has_columns) noexcept:
    cdef const cnp.npy_intp* strides = cnp.PyArray_STRIDES(x)
    to.data = <char*>cnp.PyArray_DATA(x)
    to.head_stride = strides[shape.heads_axis] if shape.heads_axis >= 0 else 0
    to.row_stride = strides[shape.rows_axis]
    to.column_stride = strides[shape.ndim - 1] if has_columns else 0
    _fill_strides(to.batch_strides, x, shape.batch_axes)


cdef inline int64_t _integer(object x, int64_t low, int64_t high):
    """Return `x` if it is an int within the limits, else a number below `low`."""
    cdef int overflow = 0
    cdef int64_t number
    if not PyLong_CheckExact(x):
        return low - 1
    number = PyLong_AsLongLongAndOverflow(x, &overflow)
    return low - 1 if overflow != 0 or number > high else number


cdef inline bint _is_zero(object x):
    return x == 0 if PyFloat_CheckExact(x) else _integer(x, 0, 0) == 0


cdef bint _integers(
    object values, int batch_axes, const int64_t* batch_shape, int64_t low, int64_t high,
    vector[int64_t]* to,
) except -1:
    """Copy one int per batch item; return False if the values are not accepted."""
    cdef int64_t items = 1, number
    cdef Py_ssize_t i
    cdef int axis
    cdef const char* data
    cdef cnp.npy_intp stride
    cdef int size
    for axis in range(batch_axes):
        items *= batch_shape[axis]
    if PyLong_CheckExact(values):
        number = _integer(values, low, high)
        if number < low:
            return False
        to.assign(<size_t>items, number)
        return True
    if batch_axes != 1:
        return False
    to.resize(<size_t>items)
    if PyList_CheckExact(values):
        if len(<list>values) != items:
            return False
        for i in range(items):
            to[0][i] = _integer((<list>values)[i], low, high)
    elif cnp.PyArray_CheckExact(values) and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>values):
        size = cnp.PyArray_ITEMSIZE(<cnp.ndarray>values)
        if (
            cnp.PyArray_NDIM(<cnp.ndarray>values) != 1
            or cnp.PyArray_DIM(<cnp.ndarray>values, 0) != items
            or not cnp.PyTypeNum_ISSIGNED(cnp.PyArray_TYPE(<cnp.ndarray>values))
            or (size != 8 and size != 4)
        ):
            return False
        data = <const char*>cnp.PyArray_DATA(<cnp.ndarray>values)
        stride = cnp.PyArray_STRIDE(<cnp.ndarray>values, 0)
        for i in range(items):
            to[0][i] = _load_int64(data + i * stride) if size == 8 else _load_int32(data + i * stride)
    else:
        return False
    for i in range(items):
        if not low <= to[0][i] <= high:
            return False
    return True


cdef extern from * nogil:
    """
    #include <cstdint>
    #include <cstring>
    template <class T>
    static T load_unaligned(const char* from) {
      T x;
      std::memcpy(&x, from, sizeof(x));
      return x;
    }
    """
    int64_t _load_int64 "load_unaligned<int64_t>"(const char*)
    int32_t _load_int32 "load_unaligned<int32_t>"(const char*)
    double _load_double "load_unaligned<double>"(const char*)
    float _load_float "load_unaligned<float>"(const char*)


cdef bint _numbers_of_heads(
    object values, int64_t heads, bint may_be_none, vector[double]* to
) except -1:
    """Copy one number per query head; return False if the values are not accepted.

    `may_be_none`: a number may also be -inf.
    """
    cdef Py_ssize_t i
    cdef int number
    cdef const char* data
    cdef cnp.npy_intp stride
    to.resize(<size_t>heads)
    if PyList_CheckExact(values):
        if len(<list>values) != heads:
            return False
        for i in range(heads):
            if not PyFloat_CheckExact((<list>values)[i]):
                return False
            to[0][i] = (<list>values)[i]
    elif cnp.PyArray_CheckExact(values) and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>values):
        number = cnp.PyArray_TYPE(<cnp.ndarray>values)
        if (
            cnp.PyArray_NDIM(<cnp.ndarray>values) != 1
            or cnp.PyArray_DIM(<cnp.ndarray>values, 0) != heads
            or (number != cnp.NPY_FLOAT64 and number != cnp.NPY_FLOAT32)
        ):
            return False
        data = <const char*>cnp.PyArray_DATA(<cnp.ndarray>values)
        stride = cnp.PyArray_STRIDE(<cnp.ndarray>values, 0)
        for i in range(heads):
            if number == cnp.NPY_FLOAT64:
                to[0][i] = _load_double(data + i * stride)
            else:
                to[0][i] = _load_float(data + i * stride)
    else:
        return False
    for i in range(heads):
        if may_be_none and to[0][i] == -INFINITY:
            continue
        if not -large_factor < to[0][i] < large_factor:  # refuses NaN too
            return False
    return True


cdef bint _pairs(
    View* to, int64_t* batch_strides, cnp.ndarray x, const Problem* problem, int64_t keys,
    bint is_one_head,
) noexcept:
    """Describe an array that broadcasts to (batch..., query heads, queries, keys), or to (queries,
    keys) if q, k and v have two axes. Return False if it does not broadcast, or if its axes may
    mean something else."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    cdef int pairs_ndim = problem.batch_axes + 3
    cdef int axis, at
    cdef int64_t wanted, length, stride
    cdef bint is_batch = problem.batch_axes < ndim < pairs_ndim
    cdef bint has_items = False
    if ndim > pairs_ndim - is_one_head:
        return False
    to.data = <char*>cnp.PyArray_DATA(x)
    to.head_stride = to.row_stride = to.column_stride = 0
    for axis in range(problem.batch_axes):
        batch_strides[axis] = 0
    for axis in range(ndim):
        at = axis + pairs_ndim - ndim  # among the axes of pairs
        length = cnp.PyArray_DIM(x, axis)
        if at < problem.batch_axes:
            wanted = problem.batch_shape[at]
        else:
            wanted = (
                problem.query_heads if at == problem.batch_axes
                else problem.query_length if at == problem.batch_axes + 1
                else keys
            )
        if length != wanted and length != 1:
            return False
        if axis < problem.batch_axes:
            is_batch = is_batch and length == problem.batch_shape[axis]
            has_items = has_items or length > 1
        stride = cnp.PyArray_STRIDE(x, axis) if length == wanted else 0
        if at < problem.batch_axes:
            batch_strides[at] = stride
        elif at == problem.batch_axes:
            to.head_stride = stride
        elif at == problem.batch_axes + 1:
            to.row_stride = stride
        else:
            to.column_stride = stride
    # The caller may have meant its first axes as batch axes (`_arguments.check_meaning_of_axes`).
    return not (is_batch and has_items)


cdef bint _are_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Return whether two arrays' memory ranges, from lowest to highest address, are disjoint."""
    cdef const char* begins[2]
    cdef const char* ends[2]
    cdef cnp.ndarray x
    cdef int i, axis
    cdef int64_t reach
    for i in range(2):
        x = a if i == 0 else b
        begins[i] = <const char*>cnp.PyArray_DATA(x)
        ends[i] = begins[i] + cnp.PyArray_ITEMSIZE(x)
        for axis in range(cnp.PyArray_NDIM(x)):
            if cnp.PyArray_DIM(x, axis) == 0:
                return True
            reach = (cnp.PyArray_DIM(x, axis) - 1) * cnp.PyArray_STRIDE(x, axis)
            if reach < 0:
                begins[i] += reach
            else:
                ends[i] += reach
    return ends[0] <= begins[1] or ends[1] <= begins[0]


cdef bint _accept_scales(
    Array* to, object scales, cnp.ndarray x, Shape shape, bint are_finite
) except -1:
    """Describe the scales of an int8 array, one per key; return False if not accepted."""
    cdef cnp.ndarray array
    cdef Shape of_scales = shape
    cdef int axis
    if not _is_plain(scales, cnp.NPY_FLOAT32):
        return False
    array = scales
    if cnp.PyArray_NDIM(array) != shape.ndim - 1:
        return False
    for axis in range(shape.ndim - 1):
        if cnp.PyArray_DIM(array, axis) != cnp.PyArray_DIM(x, axis):
            return False
    of_scales.ndim -= 1
    _fill_array(to, array, of_scales, False)
    # Keys that are not valid may have any scale: `_arguments` checks only the others.
    return are_finite or bool(_isfinite(array).all())


def attention_common(
    object q, object k, object v, object mask, object tail_mask, object bias, object is_causal,
    object q_offset, object window, object scale, object softcap, object alibi_slopes,
    object sinks, object kv_lengths, object q_lengths, object layout, object return_lse,
    object out, object num_threads, object k_scale, object v_scale, object dropout, object rng,
    bint scales_are_finite=False,
):
    """Compute `attention`, or return None if the call is unusual or wrong.

    `scales_are_finite`: the caller knows that all scales are finite.
    """
    cdef Problem problem
    cdef vector[int64_t] positions, key_counts, query_counts
    cdef vector[double] slopes, sink_logits
    if not cnp.PyArray_CheckExact(q) or not _find_dtype(<cnp.ndarray>q, &problem.dtype):
        return None
    cdef int number = cnp.PyArray_TYPE(<cnp.ndarray>q)
    problem.k_is_int8 = k_scale is not None
    problem.v_is_int8 = v_scale is not None
    if not (
        _is_plain(k, cnp.NPY_INT8 if problem.k_is_int8 else number)
        and _is_plain(v, cnp.NPY_INT8 if problem.v_is_int8 else number)
    ):
        return None
    if (is_causal is not True and is_causal is not False) or type(layout) is not str:
        return None
    if return_lse is not True and return_lse is not False:
        return None
    if rng is not None or not _is_zero(dropout):
        return None
    if layout != "bhld" and layout != "blhd":
        return None
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray>q)
    if (
        not 2 <= ndim <= max_axes
        or cnp.PyArray_NDIM(<cnp.ndarray>k) != ndim
        or cnp.PyArray_NDIM(<cnp.ndarray>v) != ndim
    ):
        return None
    cdef Shape shape = _shape(ndim, layout == "blhd")
    cdef const cnp.npy_intp* q_shape = cnp.PyArray_DIMS(<cnp.ndarray>q)
    cdef const cnp.npy_intp* k_shape = cnp.PyArray_DIMS(<cnp.ndarray>k)
    cdef const cnp.npy_intp* v_shape = cnp.PyArray_DIMS(<cnp.ndarray>v)
    cdef cnp.npy_intp out_shape[64]
    cdef int axis
    problem.batch_axes = shape.batch_axes
    for axis in range(problem.batch_axes):
        if q_shape[axis] != k_shape[axis] or q_shape[axis] != v_shape[axis]:
            return None
        problem.batch_shape[axis] = q_shape[axis]
    if shape.heads_axis >= 0:
        problem.query_heads = q_shape[shape.heads_axis]
        problem.kv_heads = k_shape[shape.heads_axis]
        if problem.kv_heads != v_shape[shape.heads_axis] or problem.kv_heads < 1:
            return None
        if problem.query_heads % problem.kv_heads != 0:
            return None
    problem.query_length = q_shape[shape.rows_axis]
    problem.key_length = k_shape[shape.rows_axis]
    problem.head_dim = q_shape[ndim - 1]
    problem.value_dim = v_shape[ndim - 1]
    if (
        problem.head_dim != k_shape[ndim - 1]
        or problem.key_length != v_shape[shape.rows_axis]
        or not 1 <= problem.head_dim <= max_dim
        or not 1 <= problem.value_dim <= max_dim
    ):
        return None

    cdef double factor = 1.0 / sqrt(<double>problem.head_dim)
    if scale is not None:
        if not PyFloat_CheckExact(scale):
            return None
        factor = scale
        if not -large_factor < factor < large_factor:
            return None
    problem.options.scale = factor
    if softcap is not None:
        if not PyFloat_CheckExact(softcap):
            return None
        problem.options.softcap = softcap
        if not 1 / large_factor < problem.options.softcap < large_factor:
            return None
        if not abs(factor) / problem.options.softcap < large_factor:
            return None
    if window is not None:
        if not PyTuple_CheckExact(window) or len(<tuple>window) != 2:
            return None
        if window[0] is not None:
            problem.options.window_left = _integer(window[0], 0, unbounded)
        if window[1] is not None:
            problem.options.window_right = _integer(window[1], 0, unbounded)
        if problem.options.window_left < 0 or problem.options.window_right < 0:
            return None
    if is_causal is True:
        problem.options.window_right = 0
    cdef int threads = default_num_threads
    if num_threads is not None:
        threads = <int>_integer(num_threads, 1, max_threads)
        if threads < 1:
            return None

    if alibi_slopes is not None:
        if not _numbers_of_heads(alibi_slopes, problem.query_heads, False, &slopes):
            return None
        problem.options.alibi_slopes = slopes.data()
    if sinks is not None:
        if not _numbers_of_heads(sinks, problem.query_heads, True, &sink_logits):
            return None
        problem.options.sinks = sink_logits.data()
    cdef bint has_positions = (
        problem.options.window_left != unbounded
        or problem.options.window_right != unbounded
        or alibi_slopes is not None
    )
    if (
        kv_lengths is not None and problem.query_length > 1 and has_positions
        and q_offset is None and q_lengths is None
    ):
        return None
    if kv_lengths is not None:
        if not _integers(
            kv_lengths, problem.batch_axes, problem.batch_shape, 0, problem.key_length, &key_counts
        ):
            return None
        problem.kv_lengths = key_counts.data()
    if q_lengths is not None:
        if not _integers(
            q_lengths, problem.batch_axes, problem.batch_shape, 0, problem.query_length,
            &query_counts,
        ):
            return None
        problem.q_lengths = query_counts.data()
    if q_offset is not None:
        if not _integers(
            q_offset, problem.batch_axes, problem.batch_shape, -max_position, max_position,
            &positions,
        ):
            return None
        problem.q_offset = positions.data()
    if mask is not None:
        if not _is_plain(mask, cnp.NPY_BOOL) or not _pairs(
            &problem.options.mask, problem.mask_batch_strides, <cnp.ndarray>mask, &problem,
            problem.key_length, shape.heads_axis < 0,
        ):
            return None
    if tail_mask is not None:
        if mask is not None or not _is_plain(tail_mask, cnp.NPY_BOOL):
            return None
        axis = cnp.PyArray_NDIM(<cnp.ndarray>tail_mask)
        if axis == 0:
            return None
        problem.options.tail_mask_keys = cnp.PyArray_DIM(<cnp.ndarray>tail_mask, axis - 1)
        if problem.options.tail_mask_keys > problem.key_length or not _pairs(
            &problem.options.mask, problem.mask_batch_strides, <cnp.ndarray>tail_mask, &problem,
            problem.options.tail_mask_keys, shape.heads_axis < 0,
        ):
            return None
    if bias is not None:
        problem.options.bias_is_float32 = _is_plain(bias, cnp.NPY_FLOAT32)
        if not (problem.options.bias_is_float32 or _is_plain(bias, number)) or not _pairs(
            &problem.options.bias, problem.bias_batch_strides, <cnp.ndarray>bias, &problem,
            problem.key_length, shape.heads_axis < 0,
        ):
            return None
    if problem.k_is_int8 and not _accept_scales(
        &problem.k_scales, k_scale, <cnp.ndarray>k, shape, scales_are_finite
    ):
        return None
    if problem.v_is_int8 and not _accept_scales(
        &problem.v_scales, v_scale, <cnp.ndarray>v, shape, scales_are_finite
    ):
        return None

    for axis in range(ndim - 1):
        out_shape[axis] = q_shape[axis]
    out_shape[ndim - 1] = problem.value_dim
    if out is None:
        out = cnp.PyArray_EMPTY(ndim, out_shape, number, 0)
    else:
        if not _is_plain(out, number) or cnp.PyArray_NDIM(<cnp.ndarray>out) != ndim:
            return None
        if not cnp.PyArray_ISCARRAY(<cnp.ndarray>out):
            return None
        for axis in range(ndim):
            if cnp.PyArray_DIM(<cnp.ndarray>out, axis) != out_shape[axis]:
                return None
        for x in (q, k, v, mask, tail_mask, bias, k_scale, v_scale):
            if x is not None and not _are_apart(<cnp.ndarray>out, <cnp.ndarray>x):
                return None
    _fill_array(&problem.q, <cnp.ndarray>q, shape, True)
    _fill_array(&problem.k, <cnp.ndarray>k, shape, True)
    _fill_array(&problem.v, <cnp.ndarray>v, shape, True)
    _fill_array(&problem.out, <cnp.ndarray>out, shape, True)
    if not return_lse:
        _run(problem, threads)
        return out
    cdef Shape of_rows = shape
    of_rows.ndim -= 1
    lse = cnp.PyArray_EMPTY(
        ndim - 1, out_shape, cnp.NPY_FLOAT64 if problem.dtype == Dtype.float64 else cnp.NPY_FLOAT32, 0
    )
    _fill_array(&problem.lse, <cnp.ndarray>lse, of_rows, False)
    _run(problem, threads)
    return out, lse
