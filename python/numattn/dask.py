"""Attention over dask arrays, on all cores of a machine or on many machines.

`attention` and `attention_backward` take and return dask arrays, chunked along batch, heads,
queries and keys. A task computes attention for some of the chunks, as `numattn.attention` does.
Results for different keys are merged by their log-sum-exp, which is exact except for rounding.
Nothing is computed before the dask arrays are. This module needs the package ``dask`` (``pip
install 'numattn[dask]'``), so `numattn` does not import it.
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

# Options of `numattn.attention` that do not exist for chunks.
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
        With respect to q, k and v, in their shapes, dtype and layout.
    bias : dask.array.Array or None
        With respect to `bias`, in its shape and dtype; None unless ``bias_gradient=True``.
    sinks : dask.array.Array, shape (Hq,), or None
        With respect to `sinks`, in their dtype if it is a float dtype, else float64; None without
        sinks.

    See Also
    --------
    attention_backward : computes them.

    Examples
    --------
    >>> import dask.array as da
    >>> import numattn.dask
    >>> random = da.random.default_rng(0)
    >>> q, k, v, dout = random.standard_normal((4, 8, 64, 16), chunks=(1, 8, 32, 16))
    >>> out, lse = numattn.dask.attention(q, k, v, return_lse=True)
    >>> gradients = numattn.dask.attention_backward(dout, q, k, v, out, lse)
    >>> gradients.k.shape, gradients.bias
    ((8, 64, 16), None)
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
    """Compute `numattn.attention` over dask arrays.

    Parameters
    ----------
    q : dask.array.Array, shape (..., Hq, Lq, D)
        Queries, as in `numattn.attention`. The result has the same chunks, unless they cut groups
        of heads (see Notes). At least one of `q`, `k` and `v` must be a dask array; NumPy arrays
        are chunked like the others.
    k : dask.array.Array, shape (..., Hkv, Lk, D)
        Keys. Their chunks along Lk determine which keys a task attends to.
    v : dask.array.Array, shape (..., Hkv, Lk, Dv)
        Values. They are rechunked to fit `k`.
    mask : dask.array.Array, array_like of bool or BlockMask, optional
        True where a query attends to a key. Broadcasts to (..., Hq, Lq, Lk). If a `BlockMask` or an
        array in memory excludes all pairs of two chunks, there is no task for them.
    bias : dask.array.Array or array_like of float, optional
        Added to the logits; -inf masks. Broadcasts like `mask`.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, kv_lengths, q_lengths, layout
        As in `numattn.attention`. Positions are those in the whole arrays. Pass NumPy arrays, not
        dask arrays.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    num_threads : int, optional
        Threads of each task. Default: 1, because dask runs a task on each of its threads. If
        workers run one task at a time, pass their number of cores. None means
        `numattn.get_num_threads` in the worker, which dask starts with OMP_NUM_THREADS=1.
    split_every : int, optional
        Number of chunks of keys that a task attends to in turn, and number of results that a task
        merges. Default: dask's setting ``split_every``, or 4.

    Returns
    -------
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. It is 0 for a query that attends to nothing.
    lse : dask.array.Array, shape ``out.shape[:-1]``
        Only with ``return_lse=True``: float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError
        As in `numattn.attention`, if none of `q`, `k` and `v` is a dask array, or if an argument
        that must be in memory is a dask array.
    ValueError
        As in `numattn.attention`, and if chunks have unknown sizes.

    See Also
    --------
    attention_backward : the gradients.
    numattn.attention : the same for arrays in memory.
    numattn.merge_states : merge results for different keys.

    Notes
    -----
    In addition to its chunks of `q`, `k` and `v` (`split_every` chunks of `k` and `v`), a task
    needs memory for less than four chunks: its result, in float32 if it will be merged, and arrays
    for an eighth of the queries. There are no tasks for chunks that lengths, causal limits, windows
    or a mask in memory exclude. Axes of head_dim are rechunked to one chunk. Heads of `q` are
    rechunked if a chunk has a part of a group together with other heads.

    The result differs from `numattn.attention` only by the rounding of merges, in float32
    (float64 for float64 inputs). The same arrays with the same chunks have the same bits, wherever
    the tasks run, if all machines use the same ISA level.

    The method is the online softmax of M. Milakov, N. Gimelshein, "Online normalizer calculation
    for softmax", 2018, with chunks instead of keys.

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
    >>> out[:, -1].compute().shape  # runs only the tasks for the last 1024 queries
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
    """Compute `numattn.attention_backward` over dask arrays.

    Parameters
    ----------
    dout : dask.array.Array, shape (..., Hq, Lq, Dv)
        Gradient with respect to `out`, in the dtype of `q`, or float32 for 16-bit inputs.
    q : dask.array.Array, shape (..., Hq, Lq, D)
        Queries, as passed to `attention`. At least one of `q`, `k` and `v` must be a dask array.
    k : dask.array.Array, shape (..., Hkv, Lk, D)
        Keys.
    v : dask.array.Array, shape (..., Hkv, Lk, Dv)
        Values.
    out : dask.array.Array, shape (..., Hq, Lq, Dv)
        The result of `attention`.
    lse : dask.array.Array, shape ``out.shape[:-1]``
        The log-sum-exp that `attention` returns with ``return_lse=True``.
    dlse : dask.array.Array, shape ``out.shape[:-1]``, optional
        Gradient with respect to `lse`, in its dtype. Default: 0, for a scalar that does not depend
        on `lse`.
    bias_gradient : bool, default False
        Also return the gradient with respect to `bias`.
    mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, kv_lengths, \
q_lengths, layout
        As passed to `attention`.
    num_threads : int, optional
        Threads of each task, as in `attention`. Default: 1.
    split_every : int, optional
        Number of arrays that a task adds up. Default: dask's setting ``split_every``, or 4.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, dask arrays in the shapes and dtypes of the
        inputs, with the chunks that `attention` gave these. `bias` is None without
        `bias_gradient`, and `sinks` is None without sinks.

    Raises
    ------
    TypeError, ValueError
        As in `numattn.attention_backward` and `attention`.

    See Also
    --------
    attention : the function that is differentiated.
    numattn.attention_backward : the same for arrays in memory; its Notes apply here too.

    Notes
    -----
    There is one task for each chunk of queries and each chunk of keys that some of the queries
    attend to. Its three results and their sums are in float32 (float64 for float64 inputs), and
    each gradient is rounded once. With 16-bit floats, `attention` returns a rounded `out`; the
    Notes of `numattn.attention_backward` describe the effect.

    The method is the backward pass of T. Dao et al., "FlashAttention: Fast and Memory-Efficient
    Exact Attention with IO-Awareness", NeurIPS 2022, with chunks instead of blocks.

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
