"""Attention in float64, short enough to trust; what everything else is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]


def attention(
    q: Array, k: Array, v: Array, *, mask: Any = None, tail_mask: Any = None, bias: Any = None,
    is_causal: bool = False, q_offset: Any = None, window: Any = None, scale: float | None = None,
    softcap: float | None = None, alibi_slopes: Any = None, sinks: Any = None,
    kv_lengths: Any = None, q_lengths: Any = None, layout: str = "bhld", dtype: Any = np.float64,
    matmul: Callable[..., Any] = np.matmul,
) -> tuple[Array, Array]:  # fmt: skip
    """Return (out, lse). With another `dtype` it is the plain NumPy computation in that dtype."""
    one_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    if layout == "blhd" and not one_head:
        q, k, v = (x.swapaxes(-2, -3) if x.ndim > 2 else x for x in (q, k, v))
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    (heads, rows, dim), (kv_heads, keys) = q.shape[-3:], k.shape[-3:-1]
    q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]).astype(dtype) for x in (q, k, v))
    pairs = (*batch, heads, rows, keys)

    k = np.repeat(k, heads // kv_heads if kv_heads else 1, axis=-3)
    v = np.repeat(v, heads // kv_heads if kv_heads else 1, axis=-3)
    valid = np.broadcast_to(keys if kv_lengths is None else np.asarray(kv_lengths), batch)
    queries = np.broadcast_to(rows if q_lengths is None else np.asarray(q_lengths), batch)
    offset = np.broadcast_to(valid - queries if q_offset is None else np.asarray(q_offset), batch)
    is_query = np.arange(rows)[:, None] < queries[..., None, None, None]  # (batch..., 1, Lq, 1)
    p = np.arange(rows)[:, None] + offset[..., None, None, None]  # (batch..., 1, Lq, 1)
    j = np.arange(keys)

    with np.errstate(all="ignore"):
        s = matmul(q, k.swapaxes(-1, -2)) * dtype(1 / np.sqrt(dim) if scale is None else scale)
        if softcap is not None:
            s = dtype(softcap) * np.tanh(s / dtype(softcap))
        attend = np.broadcast_to((j < valid[..., None, None, None]) & is_query, pairs)
        if bias is not None:
            bias = np.asarray(bias).astype(dtype)
            s = s + bias
            attend = attend & (bias != -np.inf)
        if alibi_slopes is not None:
            s = s - np.asarray(alibi_slopes, dtype)[:, None, None] * abs(p - j).astype(dtype)
        if mask is not None:
            attend = attend & mask
        if tail_mask is not None:
            attend, last = attend.copy(), np.shape(tail_mask)[-1]
            tail = np.broadcast_to(tail_mask, (*pairs[:-1], last))
            for item in np.ndindex(batch):
                end, some = int(valid[item]), min(last, int(valid[item]))
                attend[item][..., end - some : end] &= tail[item][..., last - some :]
        if is_causal:
            attend = attend & (j <= p)
        left, right = (None, None) if window is None else window
        if left is not None:
            attend = attend & (j >= p - left)
        if right is not None:
            attend = attend & (j <= p + right)
        s = np.where(attend, s, -np.inf)
        sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks)
        sink = np.where(is_query, sink.astype(dtype)[:, None, None], dtype(-np.inf))
        # The sink is a key without a value.
        m = np.concatenate([s, sink], axis=-1).max(axis=-1, keepdims=True)
        m = np.where(m == -np.inf, 0, m).astype(dtype)
        w = np.exp(s - m)
        total = w.sum(axis=-1, keepdims=True) + np.exp(sink - m)
        lse = (m + np.log(total))[..., 0]
        weights = np.where(attend, w / np.where(total == 0, 1, total), 0)
        out = weighted_sum(weights, v, attend, matmul)
    if one_head:
        return out[0], lse[0]
    if layout == "blhd":
        return out.swapaxes(-2, -3), lse.swapaxes(-1, -2)
    return out, lse


def weighted_sum(weights: Array, v: Array, attend: Array, matmul: Callable[..., Any]) -> Array:
    """Weights @ v, in which a value that is not attended to is no number at all."""
    if np.isfinite(v).all():
        product: Array = matmul(weights, v)
        return product
    terms = np.where(attend[..., None], weights[..., None] * v[..., None, :, :], 0)
    return np.asarray(terms.sum(axis=-2))


def matmul_by_einsum(a: Array, b: Array) -> Array:
    """Multiply without BLAS."""
    product: Array = np.einsum("...ij,...jk->...ik", a, b)
    return product


def error_and_bound(
    actual: Array, plain: list[Array], expected: Array, factor: float = 2
) -> tuple[float, float]:
    """Return the largest error of the finite results, and how large it may be.

    That is `factor` times the error of plain NumPy in the same precision, plus one unit in the last
    place. Both are the largest of many numbers, so that the arrays should give some thousand: plain
    NumPy's error of a few can be 0 by luck. How a matmul rounds is the BLAS's choice, which differs
    between CPUs; so `plain` has several results, the worst of which counts: that of `np.matmul`
    and that of `matmul_by_einsum`. Where the reference is not finite the result has to be equal.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite].astype(np.float64), expected[~finite], equal_nan=True):
        return np.inf, 1.0
    if not finite.any():
        return 0.0, 1.0
    expected = expected[finite]

    def largest_error(x: Array) -> float:
        # Widened to the reference's precision; 16-bit floats of other packages via float64.
        wide = x[finite].astype(np.float64).astype(expected.dtype)
        error = float(np.abs(wide - expected).max())
        return np.inf if np.isnan(error) else error

    ulp = float(np.spacing(np.abs(expected).max().astype(actual.dtype)))
    return largest_error(actual), factor * max(largest_error(x) for x in plain) + ulp
