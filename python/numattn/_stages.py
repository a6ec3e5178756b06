"""The stages of attention as separate functions, and the weights as arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _arguments, _numpy_blocks, _runtime
from ._checks import (
    ELSEWHERE,
    INFERENCE_ELSEWHERE,
    NO_DROPOUT,
    as_array,
    check_dtype,
    check_layout,
    float_array,
    heads_first,
    refuse,
    refuse_kind,
    refuse_unknown,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask

    Array = NDArray[Any]

# What to write instead of options of attention that `aggregate_values` does not take.
_ELSEWHERE = {
    "scale": "`v_scale=`",
    "attn_mask": "leave it out: weights of 0 take nothing",
    "attention_mask": "leave it out: weights of 0 take nothing",
    "enable_gqa": ELSEWHERE["enable_gqa"],
    **NO_DROPOUT,
}


def qk_scores(
    q: ArrayLike,
    k: ArrayLike,
    *,
    mask: ArrayLike | BlockMask | None = None,
    tail_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    kv_lengths: int | ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    **unknown: Any,
) -> Array:
    """Compute the logits of attention: scaled dot products after softcap, bias and masks.

    Parameters
    ----------
    q, k : array_like, shapes (..., Hq, Lq, D) and (..., Hkv, Lk, D)
        Queries and keys. All other parameters mean the same as in `attention`.

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Lk)
        Logits, natural logarithm, float32 (float64 for float64 inputs); -inf where masked. The axes
        have this order in every layout.

    Raises
    ------
    TypeError, ValueError
        As in `attention`.

    See Also
    --------
    masked_softmax : the softmax of logits, the stage that follows.
    aggregate_values : the weighted sum of values, the last stage.
    attention_weights : logits and softmax in one call, with sinks.

    Notes
    -----
    `attention` never holds all logits in memory. This function is for looking at them.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> q, k = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    >>> na.qk_scores(q, k, scale=2.0, is_causal=True)
    array([[  2., -inf, -inf],
           [  0.,   2., -inf],
           [  0.,   0.,   2.]], dtype=float32)
    """
    if unknown:
        refuse_unknown("qk_scores", unknown, INFERENCE_ELSEWHERE)
    arguments, one_head = _check(
        q, k, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        None, kv_lengths, q_lengths, layout, num_threads, k_scale,
    )  # fmt: skip
    out = np.empty(_pairs(arguments), _precision(arguments.q))
    _runtime.computations.stage(arguments, "logits", out)
    return out[0] if one_head else out


def aggregate_values(
    weights: ArrayLike,
    v: ArrayLike,
    *,
    layout: Literal["bhld", "blhd"] = "bhld",
    v_scale: ArrayLike | None = None,
    **unknown: Any,
) -> Array:
    """Compute the weighted sum of values, the last stage of attention.

    Parameters
    ----------
    weights : array_like, shape (..., Hq, Lq, Lk)
        As `attention_weights` returns them, in this order of axes for every layout. An array of
        two axes is one head.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. Query head ``h`` reads head ``h // (Hq // Hkv)``.
    layout : {"bhld", "blhd"}, default "bhld"
        Layout of `v` and the result.
    v_scale : array_like of float32, optional
        The scales of an int8 `v`, as in `attention`.

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Dv)
        In the dtype of `v`, or in the dtype of `weights` if `v` is int8.

    Raises
    ------
    TypeError
        If `weights` or `v` is not floating-point (`v` may be int8 with `v_scale`).
    ValueError
        If the shapes do not fit.

    See Also
    --------
    attention_weights : the weights, the stage before.
    attention : all stages in one call, without holding the weights.

    Notes
    -----
    A value whose weight is exactly 0 does not count, even if it is NaN. Weights may have any sign
    and any sum. A sum beyond the largest number of the dtype is infinite; where a single product is
    beyond it, the sum may be NaN. `attention`, in contrast, returns finite results for all finite
    values. NumPy computes this product.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 100, 64), dtype=np.float32)
    >>> out = na.aggregate_values(na.attention_weights(q, k), v)
    >>> bool(np.allclose(out, na.attention(q, k, v), atol=1e-6))
    True
    """
    if unknown:
        refuse_unknown("aggregate_values", unknown, _ELSEWHERE)
    w = float_array("weights", weights)
    values = as_array("v", v)
    check_layout(layout)
    scale = _arguments.key_scales("v", values, v_scale)
    if scale is None:
        check_dtype("v", values)
    if w.ndim < 2 or values.ndim < 2:
        shapes = f"shapes {w.shape} and {values.shape}"
        refuse("weights and v", shapes, "(..., heads, Lq, Lk) and (..., heads, Lk, Dv)")
    for name, x in (("weights", w), ("v", values)):
        if x.ndim > _arguments.MAX_AXES:
            refuse(name, f"{x.ndim} axes", f"at most {_arguments.MAX_AXES}")
    one_head = w.ndim == values.ndim == 2
    w3 = w[np.newaxis] if w.ndim == 2 else w
    v3 = heads_first(values, layout)
    heads, kv_heads = w3.shape[-3], v3.shape[-3]
    shapes = f"(weights {w.shape}, v {values.shape})"
    if w3.shape[-1] != v3.shape[-2]:
        refuse("weights", f"{w3.shape[-1]} keys", f"{v3.shape[-2]} as in v {shapes}")
    if kv_heads == 0 or heads % kv_heads:
        refuse("weights", f"{heads} heads", f"a multiple of the {kv_heads} heads of v {shapes}")
    precision = np.float64 if values.dtype == np.float64 or w.dtype == np.float64 else np.float32
    # [..., KV head, query head of its group, query, key]
    grouped = w3.reshape(*w3.shape[:-3], kv_heads, heads // kv_heads, *w3.shape[-2:])
    with np.errstate(all="ignore"):
        grouped = grouped.astype(precision, copy=False)
        v3 = v3.astype(precision, copy=False)
        if scale is not None:
            rows = scale if one_head or layout == "bhld" else scale.swapaxes(-1, -2)
            v3 = v3 * rows[..., np.newaxis]
        try:
            out = _numpy_blocks.aggregate(grouped, v3[..., np.newaxis, :, :], grouped != 0)
        except ValueError:
            shapes = f"leading axes of shapes {w.shape} and {values.shape}"
            refuse("weights and v", shapes, "leading axes that broadcast")
        out = out.reshape(*out.shape[:-4], heads, *out.shape[-2:])
        result: Array = out.astype(w.dtype if scale is not None else values.dtype, copy=False)
    if one_head:
        return np.asarray(result[0])
    return result if layout == "bhld" else np.ascontiguousarray(result.swapaxes(-2, -3))


def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    rows: int | ArrayLike | None = None,
    mask: ArrayLike | BlockMask | None = None,
    tail_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
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
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    **unknown: Any,
) -> Array:
    """Compute the attention pattern: the weight that each query gives to each key.

    Parameters
    ----------
    q, k : array_like, shapes (..., Hq, Lq, D) and (..., Hkv, Lk, D)
        Queries and keys. All parameters except `rows` mean the same as in `attention`.
    rows : int or array_like of int, optional
        Indices of the queries whose weights to compute; negative ones count from the end. As in
        NumPy, an integer removes the axis of queries. Default: all queries.

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Lk), (..., Hq, number of rows, Lk) or (..., Hq, Lk)
        Weights, float32 (float64 for float64 inputs); exactly 0 where masked. The axes have this
        order in every layout. The weights of a query add up to 1, or to less if its head has a
        sink.

    Raises
    ------
    TypeError, ValueError
        As in `attention`, and if a row is out of range.

    See Also
    --------
    attention_received : sums of these weights over the queries, without holding the weights.
    aggregate_values : the weighted sum of values, the stage that follows.
    numattn.plot : draws the weights.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 8, 1000, 64), dtype=np.float32)
    >>> na.attention_weights(q, k, rows=-1, is_causal=True).shape  # what the last token looks at
    (8, 1000)
    """
    if unknown:
        refuse_unknown("attention_weights", unknown, INFERENCE_ELSEWHERE)
    arguments, one_head = _check(
        q, k, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        sinks, kv_lengths, q_lengths, layout, num_threads, k_scale,
    )  # fmt: skip
    query_length = arguments.q.shape[-2]
    index = np.arange(query_length) if rows is None else _rows(rows, query_length)
    weights = _weights_of_rows(arguments, np.atleast_1d(index))
    if index.ndim == 0:
        weights = weights[..., 0, :]
    return weights[0] if one_head else weights


def attention_received(
    q: ArrayLike,
    k: ArrayLike,
    *,
    mask: ArrayLike | BlockMask | None = None,
    tail_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
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
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    **unknown: Any,
) -> Array:
    """Sum the attention weights over all queries: how much attention each key receives.

    A cache can drop keys that receive little. No array of Lq times Lk elements is made.

    Parameters
    ----------
    q, k : array_like, shapes (..., Hq, Lq, D) and (..., Hkv, Lk, D)
        Queries and keys. All other parameters mean the same as in `attention`.

    Returns
    -------
    ndarray, shape (..., Hq, Lk)
        Sums of weights, float32 (float64 for float64 inputs). The axes have this order in every
        layout. The sum over the keys of a head is the number of queries that attend to a key,
        minus the weight of the sinks.

    Raises
    ------
    TypeError, ValueError
        As in `attention`.

    See Also
    --------
    attention_weights : the weights that are summed.

    Notes
    -----
    H2O chooses by this score which keys to keep in a cache: Zhang et al., "H2O: Heavy-Hitter
    Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 8, 1000, 64), dtype=np.float32)
    >>> received = na.attention_received(q, k, is_causal=True)
    >>> received.shape, bool(np.allclose(received.sum(axis=-1), 1000))
    ((8, 1000), True)
    """
    if unknown:
        refuse_unknown("attention_received", unknown, INFERENCE_ELSEWHERE)
    arguments, one_head = _check(
        q, k, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        sinks, kv_lengths, q_lengths, layout, num_threads, k_scale,
    )  # fmt: skip
    *leading, _, key_length = _pairs(arguments)
    out = np.zeros((*leading, key_length), _precision(arguments.q))
    _runtime.computations.stage(arguments, "received", out)
    return out[0] if one_head else out


def _check(
    q: ArrayLike, k: ArrayLike, mask: Any, tail_mask: Any, bias: Any, is_causal: Any, q_offset: Any,
    window: Any, scale: Any, softcap: Any, alibi_slopes: Any, sinks: Any, kv_lengths: Any,
    q_lengths: Any, layout: Any, num_threads: Any, k_scale: Any,
) -> tuple[_arguments.Arguments, bool]:  # fmt: skip
    """Return the arguments of a stage without values, and whether there is no axis of heads."""
    q_, k_ = as_array("q", q), as_array("k", k)
    arguments = _arguments.check(
        q_, k_, None, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap,
        alibi_slopes, sinks, kv_lengths, q_lengths, layout, False, None, num_threads, k_scale,
    )  # fmt: skip
    return arguments, q_.ndim == k_.ndim == 2


def _pairs(arguments: _arguments.Arguments) -> tuple[int, ...]:
    return (*arguments.q.shape[:-1], arguments.k.shape[-2])


def _precision(q: Array) -> type[np.float64 | np.float32]:
    return np.float64 if q.dtype.itemsize == 8 else np.float32


def _weights_of_rows(arguments: _arguments.Arguments, rows: NDArray[np.int64]) -> Array:
    *leading, query_length, key_length = _pairs(arguments)
    out = np.empty((*leading, len(rows), key_length), _precision(arguments.q))
    if not _knows_positions(arguments) and len(rows) != query_length:
        _runtime.computations.stage(_with_rows(arguments, rows), "weights", out)
        return out
    for place, first, count in _runs(rows):
        some = _some_rows(arguments, first, count)
        _runtime.computations.stage(some, "weights", out[..., place : place + count, :])
    return out


def _rows(rows: int | ArrayLike, length: int) -> NDArray[np.int64]:
    """Return the indices of rows, without negative ones; a single int has no axes."""
    wanted = snapshot("rows", rows)
    if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
        refuse_kind("rows", f"dtype {wanted.dtype.name}", "ints")
    if wanted.ndim > 1:
        refuse("rows", f"shape {wanted.shape}", "an int, or ints along one axis")
    outside = (wanted >= length) | (wanted < -length if wanted.dtype.kind == "i" else False)
    if outside.any():
        refuse("rows", str(wanted[outside][0]), f"the index of one of {length} queries")
    wanted = wanted.astype(np.int64)
    return np.asarray(np.where(wanted < 0, wanted + length, wanted))


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield the place, the first row and the length of each run of consecutive rows."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
        if end > begin:
            yield begin, int(rows[begin]), end - begin


def _knows_positions(a: _arguments.Arguments) -> bool:
    """Whether it matters which query a row is."""
    no_limit = _arguments.UNBOUNDED
    limited = a.window_left != no_limit or a.window_right != no_limit
    return limited or a.alibi_slopes is not None or a.q_lengths is not None


def _with_rows(a: _arguments.Arguments, rows: slice | NDArray[np.int64]) -> _arguments.Arguments:
    mask = None if a.mask is None else a.mask[..., rows, :]
    if a.mask_blocks is not None:
        keys = a.k.shape[-2]
        if isinstance(rows, slice):
            mask = a.mask_blocks.part(rows, slice(0, keys))
        else:
            mask = a.mask_blocks.of_queries(rows, keys)
    return replace(
        a,
        q=a.q[..., rows, :],
        mask=mask,
        mask_blocks=None,
        tail_mask=None if a.tail_mask is None else a.tail_mask[..., rows, :],
        bias=None if a.bias is None else a.bias[..., rows, :],
    )


def _some_rows(a: _arguments.Arguments, first: int, count: int) -> _arguments.Arguments:
    query_length, key_length = a.q.shape[-2], a.k.shape[-2]
    if count == query_length:
        return a
    rows = slice(first, first + count)
    offset = a.q_offset
    if offset is None:
        valid = key_length if a.kv_lengths is None else a.kv_lengths
        queries = query_length if a.q_lengths is None else a.q_lengths
        offset = np.broadcast_to(np.int64(valid) - queries, a.q.shape[:-3])
    lengths = None if a.q_lengths is None else np.clip(a.q_lengths - first, 0, count)
    return replace(
        _with_rows(a, rows),
        q_offset=np.asarray(offset + first, np.int64, order="C"),  # also without axes
        q_lengths=None if lengths is None else np.asarray(lengths, np.int64, order="C"),
    )
