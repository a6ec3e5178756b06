"""Choice of pages by upper bounds of their logits, and attention to only these pages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _runtime
from ._numpy_blocks import quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from ._arguments import Arguments

    Array = NDArray[Any]
    Ints = NDArray[np.int64]

# Elements of bounds that are multiplied at a time: they stay in a core's second-level cache.
_BLOCK_NUMBERS = 1 << 17


def least_count(query_length: int, page_size: int) -> int:
    """Return the most pages that are always chosen: the first, and pages with the last tokens."""
    return 2 + -(-(max(query_length, 1) - 1) // page_size)


def choose_pages(
    q: Array, bounds: Array, table: Ints, lengths: Ints, page_size: int, count: int
) -> Ints:
    """Return the columns of the chosen pages in the table, for each batch item and KV head.

    The result, (B, Hkv, count), is ascending, with -1 if an item has fewer pages. `q` is (B, Hkv,
    rows, Lq, D), and `bounds` is (pages, Hkv, 2, D), the largest and least elements. `count` is at
    least `least_count`, or all pages of the table.
    """
    batch, kv_heads, rows, query_length, head_dim = q.shape
    places = np.full((batch, kv_heads, count), -1, np.int64)
    with quiet():
        # A product is largest with the largest or the least value of an element.
        q = q.astype(bounds.dtype, copy=False)
        signed = np.stack([np.maximum(q, 0), np.minimum(q, 0)], axis=-2)
        signed = signed.reshape(batch, kv_heads, rows * query_length, 2 * head_dim)
        for i, length in enumerate(lengths.tolist()):
            pages = -(-length // page_size)
            if pages == 0:
                continue
            last = max(max(length - query_length, 0) // page_size, 1)  # always chosen from here on
            chosen = min(count, pages)
            by_score = chosen - 1 - (pages - last)
            places[i, :, 0] = 0
            places[i, :, 1 + by_score : chosen] = np.arange(last, pages)
            if by_score == last - 1:
                places[i, :, 1:last] = np.arange(1, last)
            elif by_score > 0:
                scores = _upper_bounds(signed[i], bounds, table[i, 1:last])
                places[i, :, 1 : 1 + by_score] = 1 + _largest(scores, by_score)
    return places


def _upper_bounds(signed: Array, bounds: Array, pages: Ints) -> Array:
    """Return upper bounds (Hkv, pages) of the products of any row, (Hkv, rows, 2 D), with the keys
    of each page; infinity if a product is NaN."""
    flat = bounds.reshape(*bounds.shape[:2], -1)
    order = np.argsort(pages)
    at_once = max(1, _BLOCK_NUMBERS // max(1, flat[:1].size))
    copied = np.empty((min(at_once, len(pages)), *flat.shape[1:]), flat.dtype)
    scores = np.empty((len(signed), len(pages)), flat.dtype)
    for begin in range(0, len(pages), at_once):
        places = order[begin : begin + at_once]
        some = pages[places]
        first, end = int(some[0]), int(some[-1]) + 1
        if end - first <= 2 * len(some):  # multiplying other pages too costs less than a copy
            block, some = flat[first:end], some - first
        else:
            block = np.take(flat, some, axis=0, out=copied[: len(some)], mode="clip")
            some = np.arange(len(some))
        products = np.matmul(signed, block.transpose(1, 2, 0))
        scores[:, places] = products.max(axis=1, initial=-np.inf)[:, some]
    scores[np.isnan(scores)] = np.inf
    return scores


def _largest(scores: Array, count: int) -> Ints:
    """Return the indices of the `count` largest scores of each row, in ascending order; of equal
    scores, the first ones."""
    kept = scores.shape[1] - count
    least = np.partition(scores, kept, axis=1)[:, kept, np.newaxis]
    above, equal = scores > least, scores == least
    room = count - above.sum(axis=1, keepdims=True)
    keep = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.nonzero(keep)[1].reshape(len(scores), count)


# ---- attention ---------------------------------------------------------------------------------


def attend_to_pages(a: Arguments, places: Ints) -> None:
    """Fill ``a.out`` and, if wanted, ``a.lse`` with attention to the chosen pages.

    `a` are the arguments of attention to all pages, whose queries are the last tokens.
    """
    assert a.out is not None
    if a.out.size == 0:
        return
    for call in _calls(a, places):
        _runtime.computations.attention(call)


def _calls(a: Arguments, places: Ints) -> Iterator[Arguments]:
    """Yield problems whose batch items have one KV head each: one for all, or one per head."""
    assert a.block_table is not None
    assert a.kv_lengths is not None
    batch, kv_heads, count = places.shape
    pages = np.take_along_axis(a.block_table[:, np.newaxis], np.maximum(places, 0), axis=2)
    # The last page is always chosen: only it may be less than full.
    page_size = a.k.shape[2]
    skipped = -(-a.kv_lengths // page_size) - (places[:, 0] >= 0).sum(axis=1)
    lengths = a.kv_lengths - skipped * page_size
    a = replace(a, q_offset=None, q_lengths=None)

    def of_heads(x: Array | None) -> Any:
        if x is None:
            return None
        return x.reshape(batch, kv_heads, x.shape[1] // kv_heads, *x.shape[2:])

    q, out, lse = of_heads(a.q), of_heads(a.out), of_heads(a.lse)
    arrays: dict[str, Any] = {"k": a.k, "v": a.v, "k_scale": a.k_scale, "v_scale": a.v_scale}
    keys = {name: x for name, x in arrays.items() if x is not None}
    step = None if a.sinks is not None else _common_step(keys.values())
    if step is not None:
        of_page, of_head = step
        table = pages * of_page + np.arange(kv_heads)[:, np.newaxis] * of_head
        yield replace(
            a,
            q=q.reshape(batch * kv_heads, *q.shape[2:]),
            out=out.reshape(batch * kv_heads, *out.shape[2:]),
            lse=None if lse is None else lse.reshape(batch * kv_heads, *lse.shape[2:]),
            kv_lengths=np.repeat(lengths, kv_heads),
            block_table=table.reshape(batch * kv_heads, count),
            **{name: _pages_of_heads(x, step) for name, x in keys.items()},
        )
        return
    group = q.shape[2]
    for head in range(kv_heads):
        yield replace(
            a,
            q=q[:, head],
            out=out[:, head],
            lse=None if lse is None else lse[:, head],
            kv_lengths=lengths,
            block_table=np.ascontiguousarray(pages[:, head]),
            sinks=None if a.sinks is None else a.sinks[head * group : (head + 1) * group],
            **{name: x[:, head : head + 1] for name, x in keys.items()},
        )


def _common_step(arrays: Iterable[Array]) -> tuple[int, int] | None:
    """Return ``(a, b)`` such that head ``h`` of page ``p`` is page ``p * a + h * b`` of a view as
    pages of one head, for all arrays (pages, Hkv, size, ...); None if there is no such view."""
    steps = set()
    for x in arrays:
        page, head = x.strides[:2]
        unit = math.gcd(page, head)
        if min(page, head) < 0 or unit == 0 or x.shape[0] == 0:
            return None
        steps.add((page // unit, head // unit))
    return steps.pop() if len(steps) == 1 else None


def _pages_of_heads(x: Array, step: tuple[int, int]) -> Any:
    """View an array as pages of one head, numbered as in `_common_step`; they may overlap."""
    pages, heads = x.shape[:2]
    numbers = (pages - 1) * step[0] + (heads - 1) * step[1] + 1
    unit = math.gcd(*x.strides[:2])
    return np.lib.stride_tricks.as_strided(
        x, (numbers, 1, *x.shape[2:]), (unit, unit, *x.strides[2:]), writeable=False
    )
