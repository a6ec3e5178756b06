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
    integer,
    refuse,
    refuse_kind,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def merge_states(
    out_a: ArrayLike,
    lse_a: ArrayLike,
    out_b: ArrayLike | None = None,
    lse_b: ArrayLike | None = None,
    *,
    axis: int | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Merge attention over disjoint sets of keys into attention over all of them.

    Exact but for rounding: each part is weighted by its share of the denominator. Sinks go to one
    part only.

    Parameters
    ----------
    out_a : array_like, shape (..., Dv)
        The result over one set of keys; or, with `axis`, the results over all sets, stacked.
    lse_a : array_like, shape ``out_a.shape[:-1]``
        Its log-sum-exp, natural logarithm; -inf where a query attended to nothing.
    out_b, lse_b : array_like, optional
        The same for the other set. Not with `axis`.
    axis : int, optional
        The axis of `lse_a` along which the sets are stacked; the same axis of `out_a`, counted from
        the front if it is not negative.
    out : ndarray, optional
        Where to write the merged result; may be `out_a` or `out_b` itself.

    Returns
    -------
    out : ndarray, shape (..., Dv)
        In the dtype of `out_a`.
    lse : ndarray
        Of all keys, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not belong together.

    See Also
    --------
    attention

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
    >>> out, lse = na.merge_states(*old, *new)
    >>> bool(np.allclose(out, na.attention(q, k, v), atol=1e-6))
    True
    """
    results, logs = as_array("out_a", out_a), as_array("lse_a", lse_a)
    check_dtype("out_a", results)
    if axis is None:
        if out_b is None or lse_b is None:
            refuse_kind("out_b, lse_b", "None", "the other state, or `axis` for stacked ones")
        other, other_logs = as_array("out_b", out_b), as_array("lse_b", lse_b)
        if other.dtype != results.dtype:
            refuse_kind("out_b", dtype_name(other), f"{results.dtype.name} as in out_a")
        if other.shape != results.shape:
            refuse("out_b", f"shape {other.shape}", f"{results.shape} as in out_a")
        _check_lse("lse_a", logs, results)
        _check_lse("lse_b", other_logs, results)
        parts = [(results, logs), (other, other_logs)]
    else:
        if out_b is not None or lse_b is not None:
            refuse_kind("out_b, lse_b", "arrays", "None beside `axis`")
        _check_lse("lse_a", logs, results)
        axis = integer("axis", axis)
        if not -logs.ndim <= axis < logs.ndim:
            refuse("axis", repr(axis), f"an axis of lse_a, whose shape is {logs.shape}")
        first = axis % logs.ndim
        parts = list(zip(np.moveaxis(results, first, 0), np.moveaxis(logs, first, 0), strict=True))
        if not parts:
            refuse("out_a", f"shape {results.shape}", "at least one state along `axis`")

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
            # Rounding alone carries a mean of finite numbers beyond the largest of them.
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


def _weighted(result: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    share = weight[..., np.newaxis]
    part: NDArray[Any] = share * result.astype(weight.dtype, copy=False)
    if not weight.all():  # what attended to nothing is no part of the result, be it NaN
        np.copyto(part, 0, where=share == 0)
    return part


def _check_lse(name: str, lse: NDArray[Any], out: NDArray[Any]) -> None:
    check_dtype(name, lse)
    if out.ndim < 1 or lse.shape != out.shape[:-1]:
        refuse(name, f"shape {lse.shape}", f"{out.shape[:-1]}, as of its out without the last axis")
