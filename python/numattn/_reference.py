"""Attention in float64, short enough to trust: the reference for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass
class _Problem:
    """The logits of all pairs after all options, with heads before rows and no shared heads."""

    q: Array  # (batch..., Hq, Lq, D)
    k: Array  # (batch..., Hq, Lk, D)
    v: Array
    logits: Array  # (batch..., Hq, Lq, Lk); -inf for pairs that do not attend
    attend: Array
    capped: Array | None  # the tanh in softcap
    sink: Array  # (batch..., Hq, Lq, 1); -inf without sinks
    kept: Array  # factors of the weights for dropout, broadcast to (batch..., Hq, Lq, Lk)
    scale: Any
    one_head: bool
    swapped: bool  # whether the caller's arrays have rows before heads


def _problem(
    q: Array, k: Array, v: Array, *, mask: Any = None, tail_mask: Any = None, bias: Any = None,
    is_causal: bool = False, q_offset: Any = None, window: Any = None, scale: float | None = None,
    softcap: float | None = None, alibi_slopes: Any = None, sinks: Any = None,
    kv_lengths: Any = None, q_lengths: Any = None, dropout: float = 0, rng: Any = None,
    layout: str = "bhld", dtype: Any = np.float64, matmul: Callable[..., Any] = np.matmul,
) -> _Problem:  # fmt: skip
    one_head = q.ndim == k.ndim == v.ndim == 2
    swapped = layout == "blhd" and not one_head
    q, k, v = (_heads_first(x, swapped) for x in (q, k, v))
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
    factor = dtype(1 / np.sqrt(dim) if scale is None else scale)
    capped = None

    with np.errstate(all="ignore"):
        s = matmul(q, k.swapaxes(-1, -2)) * factor
        if softcap is not None:
            capped = np.tanh(s / dtype(softcap))
            s = dtype(softcap) * capped
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
        sink = np.broadcast_to(sink, (*pairs[:-1], 1))
    kept = np.ones((1, 1), dtype)
    if dropout:
        growth = dtype(1 / (1 - np.longdouble(dropout)))
        kept = np.where(kept_by_dropout(dropout, rng, pairs), growth, dtype(0))
    return _Problem(q, k, v, s, attend, capped, sink, kept, factor, one_head, swapped)


def kept_by_dropout(dropout: float, seed: int, pairs: tuple[int, ...]) -> Array:
    """Return which of the weights (batch..., Hq, Lq, Lk) are kept."""
    *batch, heads, rows, keys = pairs
    fours = -(-keys // 4)  # a counter is for four keys
    b, h, i, j = np.indices((int(np.prod(batch)), heads, rows, fours), np.uint64)
    words = np.stack(philox([j, i, h, b], int(seed)), axis=-1).reshape(*pairs[:-1], 4 * fours)
    return np.asarray(words[..., :keys] >= int(dropout * 2**32))


def philox(x: list[Array], seed: int) -> list[Array]:
    """Return the four words of Philox4x32 with ten rounds at the counters x, arrays of uint64."""
    for n in range(10):
        key = (seed + n * 0x9E3779B9) % 2**32, ((seed >> 32) + n * 0xBB67AE85) % 2**32
        high_0, low_0 = np.divmod(x[0] * 0xD2511F53, 2**32)
        high_2, low_2 = np.divmod(x[2] * 0xCD9E8D57, 2**32)
        x = [high_2 ^ x[1] ^ key[0], low_2, high_0 ^ x[3] ^ key[1], low_0]
    return x


def _softmax(p: _Problem) -> tuple[Array, Array, Array]:
    """Return the weights of keys and of the sink, and the log-sum-exp."""
    # The sink is a key without a value.
    m = np.concatenate([p.logits, p.sink], axis=-1).max(axis=-1, keepdims=True)
    m = np.where(m == -np.inf, 0, m).astype(p.q.dtype)
    w, of_sink = np.exp(p.logits - m), np.exp(p.sink - m)
    total = w.sum(axis=-1, keepdims=True) + of_sink
    some = np.where(total == 0, 1, total)
    return np.where(p.attend, w / some, 0), of_sink / some, (m + np.log(total))[..., 0]


def attention(
    q: Array, k: Array, v: Array, *, mask: Any = None, tail_mask: Any = None, bias: Any = None,
    is_causal: bool = False, q_offset: Any = None, window: Any = None, scale: float | None = None,
    softcap: float | None = None, alibi_slopes: Any = None, sinks: Any = None,
    kv_lengths: Any = None, q_lengths: Any = None, dropout: float = 0, rng: Any = None,
    layout: str = "bhld", dtype: Any = np.float64, matmul: Callable[..., Any] = np.matmul,
) -> tuple[Array, Array]:  # fmt: skip
    """Return (out, lse). With another `dtype`, this is the plain NumPy computation in it."""
    p = _problem(
        q, k, v, mask=mask, tail_mask=tail_mask, bias=bias, is_causal=is_causal, q_offset=q_offset,
        window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        kv_lengths=kv_lengths, q_lengths=q_lengths, dropout=dropout, rng=rng, layout=layout,
        dtype=dtype, matmul=matmul,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        weights, _, lse = _softmax(p)
        out = weighted_sum(weights * p.kept, p.v, p.attend, matmul)
    if p.one_head:
        return out[0], lse[0]
    if p.swapped:
        return out.swapaxes(-2, -3), lse.swapaxes(-1, -2)
    return out, lse


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array | None = None, lse: Array | None = None,
    *, dlse: Any = None, dtype: Any = np.float64, matmul: Callable[..., Any] = np.matmul,
    **options: Any,
) -> tuple[Array, Array, Array, Array | None, Array | None]:  # fmt: skip
    """Return the gradients with respect to q, k, v, the bias and the sinks, all of `dtype`.

    They are computed from the full weights with the derivative of the softmax. If `out` and `lse`
    are given, the weights and the row sums are computed from them instead, so that their rounding
    is part of the problem.
    """
    p = _problem(q, k, v, dtype=dtype, matmul=matmul, **options)

    def rows_of(x: Any) -> Any:
        """Return (batch..., Hq, Lq, 1) of an array like lse."""
        x = np.asarray(x).astype(dtype)
        return (x.swapaxes(-1, -2) if p.swapped else x)[..., np.newaxis]

    d = _heads_first(np.asarray(dout), p.swapped).astype(dtype)
    with np.errstate(all="ignore"):
        weights, of_sink, _ = _softmax(p)
        if lse is not None:
            base = np.where(rows_of(lse) == -np.inf, 0, rows_of(lse))
            weights = np.where(p.attend, np.exp(p.logits - base), 0)
            of_sink = np.exp(p.sink - base)
        d_weights = np.where(p.attend & (p.kept > 0), matmul(d, p.v.swapaxes(-1, -2)) * p.kept, 0)
        if out is None:
            delta = np.where(p.attend, weights * d_weights, 0).sum(axis=-1, keepdims=True)
        else:
            o = _heads_first(np.asarray(out), p.swapped).astype(dtype)
            delta = (d * o).sum(axis=-1, keepdims=True)
        if dlse is not None:
            delta = delta - rows_of(dlse)
        d_logits = np.where(p.attend, weights * (d_weights - delta), 0)
        d_products = d_logits
        if p.capped is not None:
            d_products = np.where(p.attend, d_logits * (1 - p.capped**2), 0)
        dq = weighted_sum(d_products, p.k, p.attend, matmul) * p.scale
        turned = p.attend.swapaxes(-1, -2)
        dk = weighted_sum(d_products.swapaxes(-1, -2), p.q, turned, matmul) * p.scale
        dv = weighted_sum((weights * p.kept).swapaxes(-1, -2), d, turned, matmul)
        d_bias = d_sinks = None
        if options.get("bias") is not None:
            d_bias = _summed(d_logits, np.shape(options["bias"]))
        if options.get("sinks") is not None:
            d_sink = np.where(p.sink == -np.inf, 0, -of_sink * delta)
            d_sinks = d_sink.sum(axis=(*range(d_sink.ndim - 3), -2, -1))
    return (
        _like_input(dq, q, p.swapped),
        _like_input(dk, k, p.swapped),
        _like_input(dv, v, p.swapped),
        d_bias,
        d_sinks,
    )


def _heads_first(x: Array, swapped: bool) -> Array:
    if x.ndim == 2:
        return x[np.newaxis]
    return x.swapaxes(-2, -3) if swapped else x


def _like_input(x: Array, given: Array, swapped: bool) -> Array:
    """Sum a gradient (batch..., Hq, L, D) over the axes along which `given` is shared."""
    heads = _heads_first(given, swapped).shape[-3]
    if heads != x.shape[-3]:
        x = x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads, *x.shape[-2:]).sum(axis=-3)
    if given.ndim == 2:
        return _summed(x, given.shape)
    return _summed(x.swapaxes(-2, -3) if swapped else x, given.shape)


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of this shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1 != x.shape[axis])
    return np.asarray(x.sum(axis=axes, keepdims=True))


def weighted_sum(weights: Array, v: Array, attend: Array, matmul: Callable[..., Any]) -> Array:
    """Return weights @ v, ignoring values that are not attended to, even NaN."""
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
    """Return the largest error of the finite results, and its bound.

    The bound is `factor` times the error of plain NumPy in the same precision, plus one unit in the
    last place. Both errors are the largest of many, so use arrays of a few thousand results: for a
    few results plain NumPy's error can be 0 by luck. How a matmul rounds depends on the BLAS and
    the CPU. Therefore `plain` has several results, from `np.matmul` and `matmul_by_einsum`, and the
    worst counts. If the reference is not finite, the result must be equal to it.
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
