# cython: freethreading_compatible=True
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The binding: converts NumPy arrays to pointers and strides, and status codes to exceptions."""

import os
import threading

from cpython.exc cimport PyErr_Occurred
from cpython.float cimport PyFloat_CheckExact
from libc.math cimport sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector
cimport numpy as cnp

import numpy as np

from . import _arguments, _checks

cnp.import_array()


cdef extern from "Python.h":
    # Declared here because Cython's own declaration would raise immediately: the exception must
    # stay set until the computation has stopped.
    int PyErr_CheckSignals() noexcept
    unsigned long PyThread_get_thread_ident() noexcept


cdef extern from "problem.h" namespace "numattn" nogil:
    cdef enum class Dtype:
        float32
        float64
        float16
        bfloat16

    cdef enum class Stage:
        attention
        logits
        statistics
        weights
        received

    cdef cppclass View:
        char* data
        int64_t head_stride
        int64_t row_stride
        int64_t column_stride

    cdef cppclass Array(View):
        int64_t page_stride
        int64_t* batch_strides

    cdef cppclass MaskBlocks:
        int64_t queries, keys
        int64_t row_stride
        const uint8_t* bits

    cdef cppclass Options:
        double scale, softcap
        View bias
        cbool bias_is_float32
        const double* alibi_slopes
        int64_t window_left, window_right
        View mask
        MaskBlocks mask_blocks
        int64_t tail_mask_keys
        const double* sinks
        double dropout
        uint64_t dropout_seed

    cdef cppclass Problem:
        Problem()
        int batch_axes
        int64_t* batch_shape
        int64_t query_heads, kv_heads
        int64_t query_length, key_length
        int64_t head_dim, value_dim
        Stage stage
        char* maximum
        char* sum
        Dtype dtype
        Array q, k, v, out, lse
        cbool out_is_float32
        Options options
        int64_t* mask_batch_strides
        int64_t* bias_batch_strides
        cbool k_is_int8, v_is_int8
        Array k_scales, v_scales
        const int64_t* query_starts
        const int64_t* key_starts
        const int64_t* block_table
        int64_t pages_per_item, page_size
        const int64_t* q_offset
        const int64_t* kv_lengths
        const int64_t* q_lengths

    cdef enum class Status:
        done
        out_of_memory
        interrupted

    cdef cppclass Execution:
        Execution()
        int num_threads
        cbool (*interrupted)() noexcept nogil

    Status cpp_attention "numattn::attention"(const Problem&, const Execution&) noexcept


cdef extern from "gradients.h" namespace "numattn" nogil:
    cdef cppclass GradientProblem:
        GradientProblem()
        Problem forward
        cbool dout_is_float32
        Array dout, dlse, dq, dk, dv
        View dbias
        int64_t* dbias_batch_strides

    Status cpp_attention_backward "numattn::attention_backward"(
        const GradientProblem&, const Execution&
    ) noexcept


cdef extern from "row_operations.h" namespace "numattn" nogil:
    cdef cppclass RowSoftmax:
        RowSoftmax()
        Dtype dtype
        const char* scores
        const unsigned char* mask
        char* out
        int64_t rows, columns

    cdef cppclass Rotation:
        Rotation()
        Dtype dtype
        int batch_axes
        int64_t* batch_shape
        int64_t heads, length, dim, rotary_dim
        cbool interleaved
        Array x, out, cos, sin

    cdef enum class ActivationFunction:
        gelu
        gelu_tanh
        silu
        relu
        relu_squared

    cdef cppclass Activation:
        Activation()
        Dtype dtype
        ActivationFunction function
        const char* a
        const char* times
        char* out
        int64_t elements

    cdef cppclass ActivationGradient(Activation):
        ActivationGradient()
        const char* d
        char* d_a
        char* d_times

    cdef cppclass Norm:
        Dtype dtype
        int64_t rows, columns
        double epsilon
        cbool is_centred
        const char* weight

    cdef cppclass Normalization(Norm):
        Normalization()
        char* x
        const char* add
        const char* bias
        char* out

    cdef cppclass NormalizationGradient(Norm):
        NormalizationGradient()
        const char* x
        char* d
        char* weight_parts
        char* bias_parts

    int64_t norm_gradient_parts(int64_t rows, int64_t columns)
    Status cpp_activate "numattn::activate"(const Activation&, const Execution&) noexcept
    Status cpp_activate_back "numattn::activate_back"(
        const ActivationGradient&, const Execution&
    ) noexcept
    Status cpp_normalize "numattn::normalize"(const Normalization&, const Execution&) noexcept
    Status cpp_normalize_back "numattn::normalize_back"(
        const NormalizationGradient&, const Execution&
    ) noexcept
    Status cpp_softmax "numattn::softmax"(const RowSoftmax&, const Execution&) noexcept
    Status cpp_rotate "numattn::rotate"(const Rotation&, const Execution&) noexcept


cdef extern from "projection.h" namespace "numattn" nogil:
    cdef struct HeadRotation:
        const char* cos
        const char* sin
        int64_t rows, row_stride, head_dim, rotary_dim
        cbool interleaved

    cdef cppclass Product:
        Product()
        View x, weight, out
        const char* bias
        cbool out_is_float32
        int64_t rows, depth, columns
        HeadRotation rotation

    Status cpp_multiply "numattn::multiply"(
        Dtype, const Product*, int64_t, const Execution&
    ) noexcept


cdef extern from "runtime/cpu.h" namespace "numattn" nogil:
    string cpp_cpu_name "numattn::cpu_name"() except +


cdef extern from "kernels/probes.h" namespace "numattn" nogil:
    cdef struct Probes:
        double (**multiply_adds)(int64_t) noexcept nogil
        float (*read_floats)(const float*, int64_t) noexcept nogil
        void (*exp2_float32)(const float*, float*, int64_t) noexcept nogil
        void (*exp2_float64)(const double*, double*, int64_t) noexcept nogil


cdef extern from "runtime/dispatch.h" namespace "numattn" nogil:
    cdef struct IsaLevel:
        const char* name
        Probes probes
        cbool available

    const vector[IsaLevel]& isa_levels() except +
    const IsaLevel& active_level()
    string cpp_set_isa "numattn::set_isa"(const string&) except +


cdef int64_t max_dim = _arguments.MAX_DIM
cdef object _isfinite = np.isfinite
cdef int default_num_threads = 1
# Python runs signal handlers only in this thread. Other threads need not check for signals, and
# must not while the interpreter is shutting down.
cdef unsigned long main_thread = threading.main_thread().ident


def _after_fork_in_child():
    global main_thread
    main_thread = PyThread_get_thread_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


cdef cbool interrupted() noexcept with gil:
    return PyErr_CheckSignals() != 0


cdef Execution _execution(int num_threads) noexcept:
    cdef Execution execution
    execution.num_threads = num_threads
    if PyThread_get_thread_ident() == main_thread:
        execution.interrupted = interrupted
    return execution


cdef int _run(const Problem& problem, int num_threads) except -1:
    cdef Execution execution = _execution(num_threads)
    cdef Status status
    with nogil:
        status = cpp_attention(problem, execution)
    return _raise_for(status)


cdef int _raise_for(Status status) except -1:
    if status == Status.done:
        return 0
    if PyErr_Occurred():  # a signal handler has raised it
        return -1
    if status == Status.out_of_memory:
        raise MemoryError("numattn: no memory for the scratch of its threads")
    raise RuntimeError(
        "numattn: a signal handler forked during a call; the child has none of the call's threads"
    )


cdef inline void _fill_view(View* to, cnp.ndarray x, int batch_axes, cbool has_columns) noexcept:
    """`x` has the axes (batch..., heads, rows[, columns]); one head may have no axis."""
    cdef const cnp.npy_intp* strides = cnp.PyArray_STRIDES(x)
    cdef int ndim = cnp.PyArray_NDIM(x)
    cdef int inner = 2 if has_columns else 1
    to.data = <char*>cnp.PyArray_DATA(x)
    to.head_stride = strides[batch_axes] if ndim > batch_axes + inner else 0
    to.row_stride = strides[ndim - inner]
    to.column_stride = strides[ndim - 1] if has_columns else 0


cdef inline void _fill_strides(int64_t* to, cnp.ndarray x, int batch_axes) noexcept:
    cdef int axis
    for axis in range(batch_axes):
        to[axis] = cnp.PyArray_STRIDES(x)[axis]


cdef inline void _fill(Array* to, cnp.ndarray x, int batch_axes, cbool has_columns) noexcept:
    _fill_view(to, x, batch_axes, has_columns)
    _fill_strides(to.batch_strides, x, batch_axes)


# NumPy numbers the dtypes of other packages in the order in which they are imported.
cdef int bfloat16_number = -1


cdef bint _find_dtype(cnp.ndarray x, Dtype* dtype):
    """Return whether the kernels support x's dtype; if so, set `dtype`."""
    global bfloat16_number
    cdef int number = cnp.PyArray_TYPE(x)
    if not cnp.PyArray_ISNOTSWAPPED(x):
        return False
    if number == cnp.NPY_FLOAT32:
        dtype[0] = Dtype.float32
    elif number == cnp.NPY_FLOAT64:
        dtype[0] = Dtype.float64
    elif number == cnp.NPY_FLOAT16:
        dtype[0] = Dtype.float16
    elif number == bfloat16_number:
        dtype[0] = Dtype.bfloat16
    elif x.dtype.name == "bfloat16":
        bfloat16_number = number
        dtype[0] = Dtype.bfloat16
    else:
        return False
    return True


cdef Dtype _dtype_of(cnp.ndarray x) except *:
    cdef Dtype dtype
    if not _find_dtype(x, &dtype):
        raise TypeError(f"the kernels do not support dtype {x.dtype.name}")
    return dtype


cdef inline bint _is_plain(object x, int number) noexcept:
    return (
        cnp.PyArray_CheckExact(x)
        and cnp.PyArray_TYPE(<cnp.ndarray>x) == number
        and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>x)
    )


include "_common_call.pxi"


cdef void _fill_pages(Array* to, cnp.ndarray x, int batch_axes, cbool has_columns) noexcept:
    """`x` has the axes (pages, heads, rows[, columns])."""
    cdef int axis
    _fill(to, x, 1, has_columns)
    to.page_stride = to.batch_strides[0]
    for axis in range(batch_axes):
        to.batch_strides[axis] = 0


cdef bint _is_float32_beside(cnp.ndarray x, cnp.ndarray of_16_bits) noexcept:
    return cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32 and cnp.PyArray_ITEMSIZE(of_16_bits) == 2


cdef int _describe(Problem* problem, object arguments) except -1:
    """Fill a problem from arguments, which must stay alive while the problem is used."""
    cdef object query_starts = arguments.query_starts, key_starts = arguments.key_starts
    cdef object block_table = arguments.block_table
    cdef object k_scale = arguments.k_scale, v_scale = arguments.v_scale
    cdef cnp.ndarray q = arguments.q, k = arguments.k
    cdef cnp.ndarray v = arguments.v, out = arguments.out  # None for a stage without values
    # `arguments` keeps these alive until the computation is over.
    cdef object lse = arguments.lse, mask = arguments.mask, bias = arguments.bias
    cdef object tail_mask = arguments.tail_mask  # instead of a mask
    cdef object blocks = arguments.mask_blocks  # also instead of a mask
    cdef cnp.ndarray numbers
    cdef object q_offset = arguments.q_offset, kv_lengths = arguments.kv_lengths
    cdef object q_lengths = arguments.q_lengths
    cdef object alibi_slopes = arguments.alibi_slopes, sinks = arguments.sinks
    cdef int ndim = cnp.PyArray_NDIM(q)
    cdef int axis
    cdef cnp.npy_intp item
    cdef const int64_t* lengths
    cdef int array_axes = ndim - 3
    problem.batch_axes = array_axes
    for axis in range(problem.batch_axes):
        problem.batch_shape[axis] = cnp.PyArray_DIM(q, axis)
    problem.query_heads = cnp.PyArray_DIM(q, ndim - 3)
    problem.kv_heads = cnp.PyArray_DIM(k, cnp.PyArray_NDIM(k) - 3)
    problem.query_length = cnp.PyArray_DIM(q, ndim - 2)
    problem.key_length = cnp.PyArray_DIM(k, cnp.PyArray_NDIM(k) - 2)
    problem.head_dim = cnp.PyArray_DIM(q, ndim - 1)
    problem.dtype = _dtype_of(q)
    problem.k_is_int8 = k_scale is not None
    problem.v_is_int8 = v_scale is not None
    _fill(&problem.q, q, array_axes, True)
    if v is not None:
        problem.value_dim = cnp.PyArray_DIM(v, cnp.PyArray_NDIM(v) - 1)
        _fill(&problem.out, out, array_axes, True)
        problem.out_is_float32 = _is_float32_beside(out, q)
    if block_table is None:
        _fill(&problem.k, k, array_axes, True)
        if v is not None:
            _fill(&problem.v, v, array_axes, True)
        if k_scale is not None:
            _fill(&problem.k_scales, <cnp.ndarray>k_scale, array_axes, False)
        if v_scale is not None:
            _fill(&problem.v_scales, <cnp.ndarray>v_scale, array_axes, False)
    else:
        _fill_pages(&problem.k, k, array_axes, True)
        if v is not None:
            _fill_pages(&problem.v, v, array_axes, True)
        if k_scale is not None:
            _fill_pages(&problem.k_scales, <cnp.ndarray>k_scale, array_axes, False)
        if v_scale is not None:
            _fill_pages(&problem.v_scales, <cnp.ndarray>v_scale, array_axes, False)
        problem.block_table = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>block_table)
        problem.pages_per_item = cnp.PyArray_DIM(<cnp.ndarray>block_table, 1)
        problem.page_size = problem.key_length
        problem.key_length = 0
        lengths = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>kv_lengths)
        for item in range(cnp.PyArray_SIZE(<cnp.ndarray>kv_lengths)):
            problem.key_length = max(problem.key_length, lengths[item])
    if lse is not None:
        _fill(&problem.lse, <cnp.ndarray>lse, array_axes, False)
    if query_starts is not None:
        problem.batch_axes = 1
        problem.batch_shape[0] = cnp.PyArray_DIM(<cnp.ndarray>query_starts, 0) - 1
        problem.q.batch_strides[0] = problem.out.batch_strides[0] = 0
        problem.k.batch_strides[0] = problem.v.batch_strides[0] = 0
        problem.k_scales.batch_strides[0] = problem.v_scales.batch_strides[0] = 0
        problem.lse.batch_strides[0] = 0
        problem.query_starts = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>query_starts)
        problem.key_starts = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>key_starts)
    if tail_mask is not None:
        mask = tail_mask
        problem.options.tail_mask_keys = cnp.PyArray_DIM(<cnp.ndarray>mask, array_axes + 2)
    if mask is not None:
        _fill_view(&problem.options.mask, <cnp.ndarray>mask, array_axes, True)
        _fill_strides(problem.mask_batch_strides, <cnp.ndarray>mask, array_axes)
        if query_starts is not None:
            problem.mask_batch_strides[0] = 0
    if blocks is not None:
        numbers = blocks.numbers
        _fill_view(&problem.options.mask, numbers, array_axes, True)
        _fill_strides(problem.mask_batch_strides, numbers, array_axes)
        problem.options.mask_blocks.row_stride = problem.options.mask.row_stride
        problem.options.mask.row_stride = problem.options.mask.column_stride = 0
        problem.options.mask_blocks.queries, problem.options.mask_blocks.keys = blocks.block_size
        problem.options.mask_blocks.bits = <const uint8_t*>cnp.PyArray_DATA(<cnp.ndarray>blocks.bits)
    if bias is not None:
        _fill_view(&problem.options.bias, <cnp.ndarray>bias, problem.batch_axes, True)
        _fill_strides(problem.bias_batch_strides, <cnp.ndarray>bias, problem.batch_axes)
        problem.options.bias_is_float32 = cnp.PyArray_TYPE(<cnp.ndarray>bias) == cnp.NPY_FLOAT32
    if q_offset is not None:
        problem.q_offset = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>q_offset)
    if kv_lengths is not None:
        problem.kv_lengths = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>kv_lengths)
    if q_lengths is not None:
        problem.q_lengths = <const int64_t*>cnp.PyArray_DATA(<cnp.ndarray>q_lengths)
    if alibi_slopes is not None:
        problem.options.alibi_slopes = <const double*>cnp.PyArray_DATA(<cnp.ndarray>alibi_slopes)
    if sinks is not None:
        problem.options.sinks = <const double*>cnp.PyArray_DATA(<cnp.ndarray>sinks)
    problem.options.window_left = arguments.window_left
    problem.options.window_right = arguments.window_right
    problem.options.scale = arguments.scale
    problem.options.softcap = arguments.softcap
    problem.options.dropout = arguments.dropout
    problem.options.dropout_seed = arguments.dropout_seed
    return 0


cdef int _threads(object num_threads) except -1:
    return default_num_threads if num_threads is None else <int>num_threads


def attention(object arguments):
    """Fill ``arguments.out`` and, if wanted, ``arguments.lse``; see `numattn._arguments`."""
    cdef Problem problem
    _describe(&problem, arguments)
    _run(problem, _threads(arguments.num_threads))


def attention_backward(object arguments):
    """Add to ``arguments.dq``, ``dk``, ``dv`` and ``dbias``; see `numattn._gradient_arguments`."""
    cdef GradientProblem problem
    cdef object forward = arguments.forward, dlse = arguments.dlse, dbias = arguments.dbias
    cdef Execution execution = _execution(_threads(forward.num_threads))
    cdef Status status
    cdef int axis, axes
    _describe(&problem.forward, forward)
    axes = cnp.PyArray_NDIM(<cnp.ndarray>forward.q) - 3
    problem.dout_is_float32 = _is_float32_beside(arguments.dout, forward.q)
    _fill(&problem.dout, <cnp.ndarray>arguments.dout, axes, True)
    _fill(&problem.dq, <cnp.ndarray>arguments.dq, axes, True)
    _fill(&problem.dk, <cnp.ndarray>arguments.dk, axes, True)
    _fill(&problem.dv, <cnp.ndarray>arguments.dv, axes, True)
    if dlse is not None:
        _fill(&problem.dlse, <cnp.ndarray>dlse, axes, False)
    if dbias is not None:
        _fill_view(&problem.dbias, <cnp.ndarray>dbias, axes, True)
        _fill_strides(problem.dbias_batch_strides, <cnp.ndarray>dbias, axes)
    for axis in range(axes, problem.forward.batch_axes):  # only in ragged batches
        problem.dout.batch_strides[axis] = problem.dlse.batch_strides[axis] = 0
        problem.dq.batch_strides[axis] = problem.dk.batch_strides[axis] = 0
        problem.dv.batch_strides[axis] = 0
    with nogil:
        status = cpp_attention_backward(problem, execution)
    _raise_for(status)


cdef int _run_stage(Problem* problem, Stage stage, int num_threads) except -1:
    problem.stage = stage
    return _run(problem[0], num_threads)


def stage(object arguments, str name, cnp.ndarray out not None):
    """Fill `out` with "logits" or "weights", (batch..., heads, rows, keys), or with the attention
    "received" by each key, (batch..., heads, keys)."""
    cdef Problem problem
    cdef int num_threads = _threads(arguments.num_threads)
    cdef cnp.ndarray maximum, total
    _describe(&problem, arguments)
    if name in ("logits", "weights"):
        _fill(&problem.out, out, problem.batch_axes, True)
        _run_stage(&problem, Stage.logits if name == "logits" else Stage.weights, num_threads)
        return
    maximum = cnp.PyArray_EMPTY(
        problem.batch_axes + 2, cnp.PyArray_DIMS(<cnp.ndarray>arguments.q), cnp.PyArray_TYPE(out), 0
    )
    total = maximum.copy()
    problem.maximum = <char*>cnp.PyArray_DATA(maximum)
    problem.sum = <char*>cnp.PyArray_DATA(total)
    _run_stage(&problem, Stage.statistics, num_threads)
    _fill(&problem.out, out, problem.batch_axes, False)
    _run_stage(&problem, Stage.received, num_threads)


def softmax(cnp.ndarray scores not None, object mask, cnp.ndarray out not None):
    """Fill `out` with the softmax of the last axis. All arrays are in C order; mask is bool."""
    cdef RowSoftmax problem
    cdef Execution execution = _execution(default_num_threads)
    cdef Status status
    cdef int ndim = cnp.PyArray_NDIM(scores)
    problem.dtype = _dtype_of(scores)
    problem.scores = <const char*>cnp.PyArray_DATA(scores)
    problem.out = <char*>cnp.PyArray_DATA(out)
    if mask is not None:
        problem.mask = <const unsigned char*>cnp.PyArray_DATA(<cnp.ndarray>mask)
    problem.columns = cnp.PyArray_DIM(scores, ndim - 1)
    problem.rows = cnp.PyArray_SIZE(scores) // max(problem.columns, 1)
    with nogil:
        status = cpp_softmax(problem, execution)
    _raise_for(status)


def rotate(
    cnp.ndarray x not None, cnp.ndarray cos not None, cnp.ndarray sin not None,
    cnp.ndarray out not None, bint interleaved, object num_threads=None,
):
    """Rotate pairs of x (batch..., heads, length, dim) by angles (batch..., heads, length, pairs)."""
    cdef Rotation problem
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    cdef int axis
    problem.dtype = _dtype_of(x)
    problem.batch_axes = cnp.PyArray_NDIM(x) - 3
    for axis in range(problem.batch_axes):
        problem.batch_shape[axis] = cnp.PyArray_DIM(x, axis)
    problem.heads = cnp.PyArray_DIM(x, problem.batch_axes)
    problem.length = cnp.PyArray_DIM(x, problem.batch_axes + 1)
    problem.dim = cnp.PyArray_DIM(x, problem.batch_axes + 2)
    problem.rotary_dim = 2 * cnp.PyArray_DIM(cos, problem.batch_axes + 2)
    problem.interleaved = interleaved
    _fill(&problem.x, x, problem.batch_axes, True)
    _fill(&problem.out, out, problem.batch_axes, True)
    _fill(&problem.cos, cos, problem.batch_axes, True)
    _fill(&problem.sin, sin, problem.batch_axes, True)
    with nogil:
        status = cpp_rotate(problem, execution)
    _raise_for(status)


cdef void _fill_matrix(View* view, cnp.ndarray x):
    view.data = <char*>cnp.PyArray_DATA(x)
    view.row_stride = cnp.PyArray_STRIDE(x, 0)
    view.column_stride = cnp.PyArray_STRIDE(x, 1)


cdef Product _product_of(product, Dtype* dtype) except *:
    cdef Product made
    cdef cnp.ndarray x = product.x, weight = product.weight, out = product.out, cos, sin
    dtype[0] = _dtype_of(x)
    _fill_matrix(&made.x, x)
    _fill_matrix(&made.weight, weight)
    _fill_matrix(&made.out, out)
    made.out_is_float32 = _is_float32_beside(out, x)
    if product.bias is not None:
        made.bias = <const char*>cnp.PyArray_DATA(<cnp.ndarray>product.bias)
    made.rows, made.depth = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    made.columns = cnp.PyArray_DIM(weight, 1)
    if product.rotation is not None:
        cos, sin = product.rotation.cos, product.rotation.sin
        made.rotation.cos = <const char*>cnp.PyArray_DATA(cos)
        made.rotation.sin = <const char*>cnp.PyArray_DATA(sin)
        made.rotation.rows = cnp.PyArray_DIM(cos, 0)
        made.rotation.row_stride = cnp.PyArray_STRIDE(cos, 0)
        made.rotation.head_dim = product.head_dim
        made.rotation.rotary_dim = 2 * cnp.PyArray_DIM(cos, 1)
        made.rotation.interleaved = product.rotation.interleaved
    return made


def multiply(list products not None, object num_threads=None):
    """Compute products (`_projection.Product`) of arrays with one dtype. No `x` has 0 columns."""
    cdef vector[Product] of_all
    cdef Dtype dtype
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    for product in products:
        of_all.push_back(_product_of(product, &dtype))
    with nogil:
        status = cpp_multiply(dtype, of_all.data(), <int64_t>of_all.size(), execution)
    _raise_for(status)


cdef dict activation_functions = {
    "gelu": ActivationFunction.gelu,
    "gelu_tanh": ActivationFunction.gelu_tanh,
    "silu": ActivationFunction.silu,
    "relu": ActivationFunction.relu,
    "relu_squared": ActivationFunction.relu_squared,
}


cdef inline char* _data_or_null(object x) noexcept:
    if x is None:
        return NULL
    return <char*>cnp.PyArray_DATA(<cnp.ndarray>x)


cdef int _describe_activation(
    Activation* problem, str name, cnp.ndarray a, object times, cnp.ndarray out
) except -1:
    problem.dtype = _dtype_of(a)
    problem.function = <ActivationFunction><int>activation_functions[name]
    problem.a = <const char*>cnp.PyArray_DATA(a)
    problem.times = _data_or_null(times)
    problem.out = <char*>cnp.PyArray_DATA(out)
    problem.elements = cnp.PyArray_SIZE(a)
    return 0


def activate(
    str name, cnp.ndarray a not None, object times, cnp.ndarray out not None,
    object num_threads=None,
):
    """Fill `out` with f(a), multiplied by `times` unless that is None. All arrays are in C order
    and have one dtype; `out` may be `a`."""
    cdef Activation problem
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    _describe_activation(&problem, name, a, times, out)
    with nogil:
        status = cpp_activate(problem, execution)
    _raise_for(status)


def activate_back(
    str name, cnp.ndarray d not None, cnp.ndarray a not None, object times,
    cnp.ndarray out not None, cnp.ndarray d_a not None, object d_times, object num_threads=None,
):
    """Fill `out` like `activate`, and `d_a` and `d_times` with the gradients of `a` and `times`.

    `d` is the gradient with respect to `out`; `d_a` or `d_times` may be `d`. `d_times` is None if
    `times` is None."""
    cdef ActivationGradient problem
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    _describe_activation(&problem, name, a, times, out)
    problem.d = <const char*>cnp.PyArray_DATA(d)
    problem.d_a = <char*>cnp.PyArray_DATA(d_a)
    problem.d_times = _data_or_null(d_times)
    with nogil:
        status = cpp_activate_back(problem, execution)
    _raise_for(status)


cdef int _describe_norm(
    Norm* problem, cnp.ndarray x, cnp.ndarray weight, double epsilon, bint is_centred
) except -1:
    problem.dtype = _dtype_of(x)
    problem.columns = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    problem.rows = cnp.PyArray_SIZE(x) // max(problem.columns, 1)
    problem.epsilon = epsilon
    problem.is_centred = is_centred
    problem.weight = <const char*>cnp.PyArray_DATA(weight)
    return 0


def normalize(
    cnp.ndarray x not None, object add, cnp.ndarray weight not None, object bias, double epsilon,
    bint is_centred, cnp.ndarray out not None, object num_threads=None,
):
    """Add `add` to `x` unless it is None, and fill `out` with the normalized rows (the last axis)
    of `x`. All arrays are in C order and have one dtype; `out` may be `x`."""
    cdef Normalization problem
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    _describe_norm(&problem, x, weight, epsilon, is_centred)
    problem.x = <char*>cnp.PyArray_DATA(x)
    problem.add = _data_or_null(add)
    problem.bias = _data_or_null(bias)
    problem.out = <char*>cnp.PyArray_DATA(out)
    with nogil:
        status = cpp_normalize(problem, execution)
    _raise_for(status)


def normalize_back(
    cnp.ndarray d not None, cnp.ndarray x not None, cnp.ndarray weight not None, double epsilon,
    bint is_centred, cnp.ndarray of_weight not None, object of_bias, object num_threads=None,
):
    """Turn `d`, the gradient with respect to the result of `normalize`, into the gradient with
    respect to `x`, in place. Also fill `of_weight` and, unless it is None, `of_bias`. All arrays
    are in C order."""
    cdef NormalizationGradient problem
    cdef Execution execution = _execution(_threads(num_threads))
    cdef Status status
    _describe_norm(&problem, x, weight, epsilon, is_centred)
    problem.x = <const char*>cnp.PyArray_DATA(x)
    problem.d = <char*>cnp.PyArray_DATA(d)
    shape = (norm_gradient_parts(problem.rows, problem.columns), problem.columns)
    precision = np.float64 if problem.dtype == Dtype.float64 else np.float32
    of_weight_parts = np.zeros(shape, precision)
    of_bias_parts = None if of_bias is None else np.zeros(shape, precision)
    problem.weight_parts = _data_or_null(of_weight_parts)
    problem.bias_parts = _data_or_null(of_bias_parts)
    with nogil:
        status = cpp_normalize_back(problem, execution)
    _raise_for(status)
    of_weight[...] = of_weight_parts.sum(axis=0, dtype=np.float64)
    if of_bias is not None:
        of_bias[...] = of_bias_parts.sum(axis=0, dtype=np.float64)


def set_default_num_threads(int num_threads):
    """Set the default number of threads of a call."""
    global default_num_threads
    default_num_threads = num_threads


def get_default_num_threads():
    """Return the default number of threads of a call."""
    return default_num_threads


def cpu_name():
    """Return the CPU's name."""
    return cpp_cpu_name().decode("ascii", "replace")


def isa_names():
    """Return a dict from the name of each ISA level, best last, to whether this CPU has it."""
    cdef const vector[IsaLevel]* levels = &isa_levels()
    cdef size_t i
    return {
        levels.at(i).name.decode(): bool(levels.at(i).available)
        for i in range(levels.size())
    }


def isa():
    """Return the name of the ISA level in use."""
    return active_level().name.decode()


def set_isa(str name):
    """Pin an ISA level; raise ValueError if this build or this CPU does not have it."""
    cdef string problem = cpp_set_isa(name.encode())
    if not problem.empty():
        raise ValueError(problem.decode())


ctypedef fused real:
    float
    double


def exp2(const real[::1] x not None, real[::1] y not None):
    """Set y = 2**x with the kernels' own exp2, in float32 or float64 (for tests)."""
    if x.shape[0] != y.shape[0]:
        raise ValueError("x and y have different lengths")
    if x.shape[0] == 0:
        return
    if real is float:
        active_level().probes.exp2_float32(&x[0], &y[0], x.shape[0])
    else:
        active_level().probes.exp2_float64(&x[0], &y[0], x.shape[0])


def multiply_adds(int64_t rounds, str dtype="float32"):
    """Run multiply-adds of a dtype as fast as the ISA level in use can; return the flops (for
    benchmarks)."""
    cdef double flops
    cdef Dtype wanted = {
        "float32": Dtype.float32,
        "float64": Dtype.float64,
        "float16": Dtype.float16,
        "bfloat16": Dtype.bfloat16,
    }[dtype]
    with nogil:
        flops = active_level().probes.multiply_adds[<int>wanted](rounds)
    return flops


def read_floats(const float[::1] x not None):
    """Return the sum of floats, read as fast as memory allows (for benchmarks); their number must
    be a multiple of 64."""
    cdef float total
    if x.shape[0] % 64 != 0:
        raise ValueError("the number of floats is not a multiple of 64")
    if x.shape[0] == 0:
        return 0.0
    with nogil:
        total = active_level().probes.read_floats(&x[0], x.shape[0])
    return total
