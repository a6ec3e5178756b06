"""Attention over arrays of dask: on all cores of a machine, or on many machines.

`attention` and `attention_backward` take and give arrays of dask, chunked along batch, heads,
queries and keys. A task computes with some of the chunks, as `numattn.attention` does; results over
different keys are merged by their log-sum-exp, which is exact but for rounding. Nothing is computed
before the arrays are. The package ``dask`` is needed (``pip install 'numattn[dask]'``), which is
why `numattn` does not import this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

try:
    import dask.array as da
except ImportError as error:
    raise ImportError("numattn.dask needs dask: pip install 'numattn[dask]'") from error
if getattr(da, "ARRAY_EXPR_ENABLED", False):
    raise ImportError(
        "numattn.dask: got dask's setting array.query-planning=True, whose arrays have no graph to "
        "extend, expected False; unset DASK_ARRAY__QUERY_PLANNING"
    )

from . import _dask_backward, _dask_forward, _dask_problem
from ._checks import ELSEWHERE, flag, refuse_unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ._option_types import DaskOptions

__all__ = ["Gradients", "attention", "attention_backward"]

# What `numattn.attention` has, and chunks do not.
_NOT_HERE = {
    "tail_mask": "`mask=` for all keys",
    "out": "use `dask.array.store` to write the result to an array",
    "k_scale": "multiply `k` by its scales and pass floats",
    "v_scale": "multiply `v` by its scales and pass floats",
    "dropout": "chunks have no dropout, because which weights are dropped depends on all arrays; "
    "`numattn.attention` has it",
    "rng": "chunks have no dropout",
}


class Gradients(NamedTuple):
    """Gradients with respect to the inputs of `attention`, by their names.

    Attributes
    ----------
    q, k, v : dask.array.Array
        In the shapes, dtype and layout of the inputs.
    bias : dask.array.Array or None
        In the shape and dtype of `bias`; None where it was not asked for.
    sinks : dask.array.Array, shape (Hq,), or None
        In the dtype of `sinks` if that is a float, else float64; None without sinks.

    See Also
    --------
    attention_backward : what gives them.
    """

    q: da.Array
    k: da.Array
    v: da.Array
    bias: da.Array | None
    sinks: da.Array | None


@overload
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DaskOptions],
) -> da.Array: ...
@overload
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: Literal[True],
    **options: Unpack[DaskOptions],
) -> tuple[da.Array, da.Array]: ...
@overload
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: bool,
    **options: Unpack[DaskOptions],
) -> da.Array | tuple[da.Array, da.Array]: ...
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: int | ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    return_lse: bool = False,
    num_threads: int | None = 1,
    split_every: int | None = None,
    **unknown: Any,
) -> da.Array | tuple[da.Array, da.Array]:
    """`numattn.attention` over arrays of dask.

    Parameters
    ----------
    q : dask.array.Array, shape (..., Hq, Lq, D)
        Queries, as in `numattn.attention`. The result has their chunks, except where they cut
        groups of heads in a way that no task can read (see Notes). One of `q`, `k` and `v` has
        to be an array of dask; NumPy arrays are chunked as the others are.
    k : dask.array.Array, shape (..., Hkv, Lk, D)
        Keys, whose chunks along Lk say which keys a task attends to.
    v : dask.array.Array, shape (..., Hkv, Lk, Dv)
        Values, rechunked to fit `k`.
    mask : dask.array.Array, array_like of bool or BlockMask, optional
        True where a query attends to a key; broadcasts to (..., Hq, Lq, Lk). Where a `BlockMask` or
        an array in memory leaves nothing of two chunks, they make no task.
    bias : dask.array.Array or array_like of float, optional
        Added to the logits; -inf masks. Broadcasts like `mask`.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, kv_lengths, q_lengths, layout
        As in `numattn.attention`, with the positions of the whole arrays. Arrays of NumPy, not of
        dask.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    num_threads : int, optional
        Threads of each task. Default: 1, because dask runs a task on each of its threads. For
        workers that run one task at a time, the number of their cores; None is what
        `numattn.get_num_threads` gives in the worker, which dask starts with OMP_NUM_THREADS=1.
    split_every : int, optional
        How many chunks of keys a task attends to, one after the other, and how many results a task
        merges. Default: dask's setting ``split_every``, or 4.

    Returns
    -------
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. A query that attends to nothing gets zeros.
    lse : dask.array.Array, shape ``out.shape[:-1]``
        Only with ``return_lse=True``: float32 (float64 for float64).

    Raises
    ------
    TypeError
        As `numattn.attention`; also if no array is of dask, or one that has to be in memory is.
    ValueError
        As `numattn.attention`; also if chunks have unknown sizes.

    See Also
    --------
    attention_backward : its gradients.
    numattn.attention : the same for arrays in memory.
    numattn.merge_states : how results over different keys become one.

    Notes
    -----
    Beyond its chunks of `q`, `k` and `v` (`split_every` of these) a task needs less than four
    chunks of memory: its result, in float32 where it is to be merged, and what an eighth of the
    queries needs. Chunks that
    lengths, causal limits, windows or a mask in memory exclude make no task. Axes of head_dim are
    rechunked to one chunk; heads of `q` too, where a chunk has a part of some group and more.

    The result differs from one machine's by the rounding of the merging, in float32 (float64 for
    float64). The same arrays with the same chunks give the same bits wherever the tasks run on the
    same level of the kernels.

    The method is the online softmax of M. Milakov, N. Gimelshein, "Online normalizer calculation
    for softmax", 2018, with chunks in place of keys.

    Examples
    --------
    >>> import dask.array as da
    >>> import numattn.dask
    >>> q, k, v = (
    ...     da.random.default_rng(n).standard_normal((8, 4096, 64), chunks=(8, 1024, 64))
    ...     for n in range(3)
    ... )
    >>> out = numattn.dask.attention(q, k, v, is_causal=True)
    >>> out.chunks
    ((8,), (1024, 1024, 1024, 1024), (64,))
    >>> out[:, -1].compute().shape  # makes the tasks of the last 1024 queries alone
    (8, 64)
    """
    if unknown:
        refuse_unknown("numattn.dask.attention", unknown, {**ELSEWHERE, **_NOT_HERE})
    problem = _dask_problem.check(
        q, k, v, split_every=split_every, options={
            "mask": mask, "bias": bias, "is_causal": is_causal, "q_offset": q_offset,
            "window": window, "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes,
            "sinks": sinks, "kv_lengths": kv_lengths, "q_lengths": q_lengths, "layout": layout,
            "num_threads": num_threads,
        },
    )  # fmt: skip
    return _dask_forward.attention(problem, flag("return_lse", return_lse))


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    bias_gradient: bool = False,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: int | ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    num_threads: int | None = 1,
    split_every: int | None = None,
    **unknown: Any,
) -> Gradients:
    """`numattn.attention_backward` over arrays of dask.

    Parameters
    ----------
    dout : dask.array.Array, shape (..., Hq, Lq, Dv)
        Gradient with respect to `out`. In the dtype of `q`, or float32 with 16-bit inputs.
    q : dask.array.Array, shape (..., Hq, Lq, D)
        Queries, as they were given to `attention`. One of `q`, `k` and `v` has to be an array of
        dask.
    k : dask.array.Array, shape (..., Hkv, Lk, D)
        Keys.
    v : dask.array.Array, shape (..., Hkv, Lk, Dv)
        Values.
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        The result of `attention`.
    lse : dask.array.Array, shape ``out.shape[:-1]``
        The log-sum-exp of `attention` with ``return_lse=True``.
    dlse : dask.array.Array, shape ``out.shape[:-1]``, optional
        Gradient with respect to `lse`, in its dtype. Default: none.
    bias_gradient : bool, default False
        Also return the gradient with respect to `bias`.
    mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, kv_lengths, \
q_lengths, layout
        What `attention` was given.
    num_threads : int, optional
        Threads of each task, as in `attention`. Default: 1.
    split_every : int, optional
        How many arrays a task adds up. Default: dask's setting ``split_every``, or 4.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, arrays of dask in the shapes and dtypes of the
        inputs, chunked as these were to fit each other. `bias` is None without `bias_gradient`,
        `sinks` without sinks.

    Raises
    ------
    TypeError, ValueError
        As `numattn.attention_backward` and `attention`.

    See Also
    --------
    attention : what it is the derivative of.
    numattn.attention_backward : the same for arrays in memory; what holds of both.

    Notes
    -----
    There is a task for each chunk of queries with each chunk of keys that some of them attend to.
    Its three results are in float32 (float64 for float64), as are their sums; each gradient is
    rounded once. With 16-bit floats the `out` of `attention` is rounded, which
    `numattn.attention_backward` says more about.

    The method is the backward pass of T. Dao et al., "FlashAttention: Fast and Memory-Efficient
    Exact Attention with IO-Awareness", NeurIPS 2022, with chunks in place of blocks.

    Examples
    --------
    >>> import dask.array as da
    >>> import numattn.dask
    >>> q, k, v, dout = (
    ...     da.random.default_rng(n).standard_normal((8, 512, 64), chunks=(8, 256, 64))
    ...     for n in range(4)
    ... )
    >>> out, lse = numattn.dask.attention(q, k, v, is_causal=True, return_lse=True)
    >>> gradients = numattn.dask.attention_backward(dout, q, k, v, out, lse, is_causal=True)
    >>> gradients.q.chunks
    ((8,), (256, 256), (64,))
    >>> dq, dk, dv = da.compute(*gradients[:3])  # together, so that pairs are computed once
    """
    if unknown:
        refuse_unknown("numattn.dask.attention_backward", unknown, {**ELSEWHERE, **_NOT_HERE})
    problem = _dask_problem.check(
        q, k, v, split_every=split_every, bias_gradient=bias_gradient, options={
            "mask": mask, "bias": bias, "is_causal": is_causal, "q_offset": q_offset,
            "window": window, "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes,
            "sinks": sinks, "kv_lengths": kv_lengths, "q_lengths": q_lengths, "layout": layout,
            "num_threads": num_threads,
        },
    )  # fmt: skip
    results = _dask_backward.check_results(problem, dout, out, lse, dlse)
    gradients = _dask_backward.attention_backward(problem, results)
    return Gradients(
        gradients["q"],
        gradients["k"],
        gradients["v"],
        gradients.get("bias"),
        gradients.get("sinks"),
    )
