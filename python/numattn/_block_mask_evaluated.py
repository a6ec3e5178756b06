"""Evaluation of only those blocks that may be mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._block_mask_bits import blocks_of, distinct, no_bits, normal_form, pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]

_PAIRS_AT_A_TIME = 2**18


def evaluated(
    lengths: Size,
    block_size: Size,
    blocks: Array,
    keep: Callable[[Array, Array], Array],
    alike: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Return the normal form of blocks that are EMPTY, FULL, or must be evaluated with `keep`.

    `keep` takes queries (n, block_queries, 1) and keys (n, 1, block_keys), and returns which pairs
    attend. `alike` takes the first query and key of each block, and returns equal numbers for
    blocks with equal pairs. With `alike`, the indices that `keep` gets may be beyond the lengths.
    """
    is_open = blocks >= 0
    rows, columns = np.nonzero(is_open)
    place = np.arange(len(rows))
    if alike is not None:
        kinds = alike(rows * block_size[0], columns * block_size[1])
        _, first, place = np.unique(kinds, return_index=True, return_inverse=True)
        rows, columns = rows[first], columns[first]
    at_a_time = max(1, _PAIRS_AT_A_TIME // (block_size[0] * block_size[1]))
    numbers = np.empty(len(rows), np.int32)
    kept, count = [no_bits(block_size)], 0
    for begin in range(0, len(rows), at_a_time):
        part = slice(begin, begin + at_a_time)
        q = rows[part, np.newaxis, np.newaxis] * block_size[0]
        k = columns[part, np.newaxis, np.newaxis] * block_size[1]
        q = q + np.arange(block_size[0])[:, np.newaxis]
        k = k + np.arange(block_size[1])
        if alike is None:
            q, k = np.minimum(q, lengths[0] - 1), np.minimum(k, lengths[1] - 1)
        bits, places = distinct(pack(keep(q, k)))
        numbers[part] = places + count
        kept.append(bits)
        count += len(bits)
    blocks[is_open] = numbers[place]
    return normal_form(blocks, np.concatenate(kept), lengths, block_size)


def ends_of_blocks(lengths: Size, block_size: Size) -> tuple[Array, Array, Array, Array]:
    """Return the first and last queries of blocks, as columns, and their first and last keys."""
    ends = []
    for length, block in zip(lengths, block_size, strict=True):
        first = np.arange(blocks_of(length, block)) * block
        ends += [first, np.minimum(first + block, length) - 1]
    return ends[0][:, np.newaxis], ends[1][:, np.newaxis], ends[2], ends[3]


def extremes_of_blocks(values: Array, block: int) -> tuple[Array, Array]:
    """Return the least and the largest value of each block."""
    if len(values) == 0:
        return values, values
    first = np.arange(0, len(values), block)
    return np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)
