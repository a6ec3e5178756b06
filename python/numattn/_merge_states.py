"""Attention over disjoint sets of keys, merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import (
    as_array,
    check_dtype,
    check_out,
    check_overlap,
    dtype_name,
    kind_of,
    refuse,
    refuse_kind,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    State = tuple[Array, Array]  # the result (..., Dv) and its log-sum-exp (...)


def merge_states(
    states: Iterable[tuple[ArrayLike, ArrayLike]], *, out: Array | None = None
) -> tuple[Array, Array]:
    """Merge attention over disjoint sets of keys into attention over all of them.

    The result is exact except for rounding: each state is weighted by its share of the softmax's
    denominator. Pass sinks to one of the calls only.

    Parameters
    ----------
    states : iterable of pairs
        For each set of keys the pair that ``attention(..., return_lse=True)`` returns: the result,
        shape (..., Dv), and its log-sum-exp, shape (...), natural logarithm, which is -inf for
        queries that attend to nothing. Use ``zip(outs, lses)`` for states stacked along a first
        axis.
    out : ndarray, optional
        Array to write the result to, of its shape and dtype. It may be the result of a state.

    Returns
    -------
    out : ndarray, shape (..., Dv)
        The merged result, in the dtype of the states.
    lse : ndarray, shape (...)
        Its log-sum-exp. Natural logarithm, float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError
        If `states` is not an iterable of pairs, or its dtypes differ.
    ValueError
        If there is no state, or the shapes differ.

    See Also
    --------
    attention : returns a state with ``return_lse=True``.
    numattn.dask.attention : attends to keys in many chunks and merges the states.

    Notes
    -----
    With the merged maximum subtracted, this is the sum of the softmax's numerators over the sum of
    its denominators, as in M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax",
    2018.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8), dtype=np.float32)
    >>> old = na.attention(q, k[:, :60], v[:, :60], return_lse=True)
    >>> new = na.attention(q, k[:, 60:], v[:, 60:], return_lse=True)
    >>> out, lse = na.merge_states([old, new])
    >>> bool(np.allclose(out, na.attention(q, k, v), atol=1e-6))
    True
    """
    parts = _check_states(states)
    results = parts[0][0]
    precision = np.float64 if results.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        all_logs = np.stack([log.astype(precision) for _, log in parts])
        maximum = all_logs.max(axis=0)
        base = np.where(maximum == -np.inf, precision(0), maximum)
        weights = np.exp(all_logs - base)
        total = weights.sum(axis=0)
        lse = (maximum + np.log(total)).astype(precision)
        weights /= np.where(total == 0, precision(1), total)
        weighted = (_weighted(x, weight) for (x, _), weight in zip(parts, weights, strict=True))
        merged = next(weighted)
        for part in weighted:
            merged += part
        if not np.isfinite(merged).all():
            # Only rounding can make a mean of finite numbers overflow.
            finite = np.ones(merged.shape, np.bool_)
            for (result, _), weight in zip(parts, weights, strict=True):
                finite &= np.isfinite(result) | (weight[..., np.newaxis] == 0)
            largest = np.finfo(precision).max
            np.clip(merged, -largest, largest, out=merged, where=finite)
        if out is None:
            return merged.astype(results.dtype, copy=False), lse
        check_out(out, merged.shape, results.dtype)
        check_overlap(out, {})
        out[...] = merged
    return out, lse


def _weighted(result: Array, weight: Array) -> Array:
    share = weight[..., np.newaxis]
    part: Array = share * result.astype(weight.dtype, copy=False)
    if not weight.all():  # a state that attended to nothing does not count, even if NaN
        np.copyto(part, 0, where=share == 0)
    return part


def _check_states(states: object) -> list[State]:
    """Return the states as arrays of one shape and dtype."""
    expected = "an iterable of pairs (out, lse), as attention(..., return_lse=True) returns them"
    try:
        pairs = list(states)  # type: ignore[call-overload]
    except TypeError:
        refuse_kind("states", kind_of(states), expected)
    if not pairs:
        refuse("states", "no state", "at least one pair (out, lse)")
    parts: list[State] = []
    for n, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            seen = f"shape {pair.shape}" if isinstance(pair, np.ndarray) else type(pair).__name__
            refuse_kind(f"states[{n}]", seen, f"a pair (out, lse): pass {expected}")
        names = f"states[{n}][0]", f"states[{n}][1]"
        result, lse = (as_array(name, x) for name, x in zip(names, pair, strict=True))
        check_dtype(names[0], result)
        check_dtype(names[1], lse)
        first = parts[0][0] if parts else result
        if result.dtype != first.dtype:
            refuse_kind(names[0], dtype_name(result), f"{first.dtype.name} as in states[0][0]")
        if result.shape != first.shape:
            refuse(names[0], f"shape {result.shape}", f"{first.shape} as in states[0][0]")
        if result.ndim < 1 or lse.shape != result.shape[:-1]:
            wanted = f"{result.shape[:-1]}, the shape of {names[0]} without the last axis"
            refuse(names[1], f"shape {lse.shape}", wanted)
        parts.append((result, lse))
    return parts
