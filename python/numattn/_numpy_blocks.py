"""Parts that the computations in NumPy share.

These are problems without sequences and pages, blocks of their rows, logits of a block, and
products that ignore masked values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _dropout
from ._arguments import expanded_tail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ._arguments import Arguments

    Array = NDArray[Any]

# The most logits in a block. Together with arrays made from them, they take about five times their
# own memory.
_BLOCK_LOGITS = 1 << 20


def quiet() -> np.errstate:
    """Return a context in which NumPy does not warn, whatever the user's error state.

    NaN and infinity in the input are the user's business, and overflow results in inf, as in a
    cast.
    """
    return np.errstate(all="ignore")


def plain_problems(a: Arguments) -> Iterator[Arguments]:
    """Yield problems without sequences, pages and scales."""
    if a.query_starts is not None and a.key_starts is not None:
        assert a.v is not None
        assert a.out is not None
        for i, (q, k) in enumerate(zip(slices(a.query_starts), slices(a.key_starts), strict=True)):
            yield from plain_problems(
                replace(
                    a,
                    q=a.q[:, q],
                    k=a.k[:, k],
                    v=a.v[:, k],
                    out=a.out[:, q],
                    lse=None if a.lse is None else a.lse[:, q],
                    tail_mask=None if a.tail_mask is None else a.tail_mask[:, q],
                    k_scale=None if a.k_scale is None else a.k_scale[:, k],
                    v_scale=None if a.v_scale is None else a.v_scale[:, k],
                    q_offset=None if a.q_offset is None else a.q_offset[i],
                    query_starts=None,
                    key_starts=None,
                    first_item=i,
                )
            )
    elif a.block_table is not None and a.kv_lengths is not None:
        assert a.out is not None
        for i, length in enumerate(a.kv_lengths):
            pages = a.block_table[i, : -(-int(length) // a.k.shape[2])]

            def gathered(x: Array | None, pages: Array = pages, length: int = length) -> Any:
                if x is None:
                    return None
                rows = x[pages].swapaxes(0, 1)
                return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :length]

            yield from plain_problems(
                replace(
                    a,
                    q=a.q[i],
                    k=gathered(a.k),
                    v=gathered(a.v),
                    out=a.out[i],
                    lse=None if a.lse is None else a.lse[i],
                    tail_mask=None if a.tail_mask is None else a.tail_mask[i],
                    k_scale=gathered(a.k_scale),
                    v_scale=gathered(a.v_scale),
                    q_offset=None if a.q_offset is None else a.q_offset[i],
                    q_lengths=None if a.q_lengths is None else a.q_lengths[i],
                    kv_lengths=None,
                    block_table=None,
                )
            )
    else:
        precision = np.float64 if a.q.dtype.itemsize == 8 else np.float32
        if a.k_scale is not None:
            a = replace(a, k=a.k * a.k_scale[..., np.newaxis].astype(precision), k_scale=None)
        if a.v is not None and a.v_scale is not None:
            a = replace(a, v=a.v * a.v_scale[..., np.newaxis].astype(precision), v_scale=None)
        yield a


def slices(starts: Array) -> Iterator[slice]:
    return map(slice, starts[:-1].tolist(), starts[1:].tolist())


def blocks(a: Arguments) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
    """Yield batch items, KV heads and rows whose logits are few enough to be held at once."""
    kv_heads, key_length = a.k.shape[-3:-1]
    query_heads, query_length = a.q.shape[-3:-1]
    if a.q.size == 0:
        return
    row_logits = max(1, query_heads // kv_heads * key_length)
    rows = max(1, min(query_length, _BLOCK_LOGITS // row_logits))
    heads = max(1, min(kv_heads, _BLOCK_LOGITS // (row_logits * rows)))
    for batch_item in np.ndindex(a.q.shape[:-3]):
        queries = _queries(a, batch_item)
        for head in range(0, kv_heads, heads):
            for row in range(0, queries, rows):
                yield (
                    batch_item,
                    slice(head, min(head + heads, kv_heads)),
                    slice(row, min(row + rows, queries)),
                )


def _queries(a: Arguments, batch_item: tuple[int, ...]) -> int:
    return a.q.shape[-2] if a.q_lengths is None else int(a.q_lengths[batch_item])


def query_heads_of(a: Arguments, kv_heads: slice) -> slice:
    group = a.q.shape[-3] // a.k.shape[-3]
    return slice(kv_heads.start * group, kv_heads.stop * group)


def masked_logits(
    a: Arguments, batch_item: tuple[int, ...], kv_heads: slice, rows: slice
) -> tuple[Array, Array, slice, Array | None]:
    """Return a block's logits, which of them are attended to, their keys, and the hyperbolic
    tangents before softcap multiplies them; axes are [KV head, query head of its group, row,
    key]."""
    query_heads = query_heads_of(a, kv_heads)
    precision = np.float64 if a.q.dtype.itemsize == 8 else np.float32

    def grouped(x: Array) -> Array:
        heads = kv_heads.stop - kv_heads.start
        return x.reshape(heads, x.shape[0] // heads, *x.shape[1:])

    valid = a.k.shape[-2] if a.kv_lengths is None else int(a.kv_lengths[batch_item])
    offset = valid - _queries(a, batch_item)
    if a.q_offset is not None:
        offset = int(a.q_offset[batch_item])
    first, last = offset + rows.start, offset + rows.stop - 1
    begin = min(max(first - a.window_left, 0), valid)
    keys = slice(begin, max(begin, min(last + a.window_right + 1, valid)))

    q = grouped(a.q[batch_item][query_heads, rows].astype(precision, copy=False))
    k = a.k[batch_item][kv_heads, np.newaxis, keys].astype(precision, copy=False)
    logits = np.matmul(q, k.swapaxes(-1, -2)) * precision(a.scale)
    capped = None
    if a.softcap:
        capped = np.tanh(logits / precision(a.softcap))
        logits = precision(a.softcap) * capped

    # As floats, differences of positions are still exact.
    distance = (np.arange(rows.start, rows.stop) + (offset - begin))[:, np.newaxis] - np.arange(
        keys.stop - begin
    )
    attend = (distance <= a.window_left) & (distance >= -a.window_right)
    if a.bias is not None:
        bias = grouped(a.bias[batch_item][query_heads, rows, keys].astype(precision, copy=False))
        logits += bias
        attend = attend & (bias != -np.inf)
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes[query_heads].astype(precision)[:, np.newaxis, np.newaxis]
        logits -= grouped(slopes * np.abs(distance).astype(precision))
    if a.mask is not None:
        attend = attend & grouped(a.mask[batch_item][query_heads, rows, keys])
    if a.mask_blocks is not None:
        attend = attend & grouped(a.mask_blocks[batch_item][query_heads].part(rows, keys))
    if a.tail_mask is not None:
        tail = a.tail_mask[batch_item][query_heads, rows]
        of_keys = expanded_tail(tail, None, valid)[..., keys]
        attend = attend & grouped(np.broadcast_to(of_keys, (*tail.shape[:-1], of_keys.shape[-1])))
    return np.where(attend, logits, precision(-np.inf)), attend, keys, capped


def kept_weights(
    a: Arguments, batch_item: tuple[int, ...], kv_heads: slice, rows: slice, keys: slice
) -> Array:
    """Return which weights of a block dropout keeps, with the axes of its logits."""
    item = a.first_item + int(np.ravel_multi_index(batch_item, a.q.shape[:-3]))
    query_heads = query_heads_of(a, kv_heads)
    kept = _dropout.kept(a.dropout, a.dropout_seed, item, query_heads, rows, keys)
    heads = kv_heads.stop - kv_heads.start
    return kept.reshape(heads, len(kept) // heads, *kept.shape[1:])


def aggregate(weights: Array, v: Array, attend: Array, largest: float = np.inf) -> Array:
    """Return weights @ v, ignoring values that are not attended to, even NaN.

    If weights add up to 1, only rounding can make a sum of finite values overflow; `largest`
    limits it.
    """
    finite = np.isfinite(v)
    if finite.all():
        out: Array = np.matmul(weights, v)
        return np.clip(out, -largest, largest, out=out)
    # A weight of 0 does not keep NaN or infinity out of queries that mask the key. Infinite values
    # are replaced by tiny ones rather than by 0, because an infinite weight times 0 is NaN.
    least = np.copysign(np.finfo(v.dtype).tiny, v)
    out = np.matmul(weights, np.where(finite, v, np.where(np.isnan(v), 0, least)))
    np.clip(out, -largest, largest, out=out)
    attend = np.broadcast_to(attend, weights.shape)
    attended = attend.any(axis=tuple(range(attend.ndim - 1)))
    keys = np.flatnonzero(attended & ~finite.all(axis=(*range(v.ndim - 2), v.ndim - 1)))
    _show_non_finite(out, weights[..., keys], v[..., keys, :], attend[..., keys])
    return out


def _show_non_finite(out: Array, weights: Array, v: Array, attend: Array) -> None:
    """Add the products of attended infinities and NaNs with their weights to `out`."""

    def meet(chosen: Array, values: Array) -> Array:
        """Return whether a query chose a key with such a value, by a product of floats (BLAS)."""
        if not (chosen.any() and values.any()):
            return np.zeros(out.shape, np.bool_)
        return np.asarray(np.matmul(chosen.astype(np.float32), values.astype(np.float32)) > 0)

    positive, negative = attend & (weights > 0), attend & (weights < 0)
    rising, falling = v == np.inf, v == -np.inf
    out[meet(positive, rising) | meet(negative, falling)] += np.inf
    out[meet(positive, falling) | meet(negative, rising)] -= np.inf
    neither = attend & ~positive & ~negative  # 0 and NaN
    out[meet(neither, rising | falling) | meet(attend, np.isnan(v))] = np.nan
