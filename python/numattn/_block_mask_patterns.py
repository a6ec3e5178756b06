"""Block masks that many models share, made without asking for each pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._arguments import MAX_POSITION
from ._block_mask_bits import EMPTY, FULL, bytes_of, distinct, pack
from ._block_mask_store import BlockMaskStore, check_block_size, grid_of
from ._checks import at_least, integer, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]

_PAIRS_AT_A_TIME = 2**18


class BlockMaskPatterns(BlockMaskStore):
    __slots__ = ()

    @classmethod
    def causal(
        cls,
        Lq: int,
        Lk: int,
        q_offset: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask by which a query attends to no key after it.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        q_offset : int, optional
            Position of the first query among the keys; by default ``Lk - Lq``: the last query is
            beside the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size or the position is not an int, or out of range.

        See Also
        --------
        attention : takes ``is_causal=True`` too, which needs no mask.
        window : neither what is far away.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.causal(2, 4).to_dense().astype(int)
        array([[1, 1, 1, 0],
               [1, 1, 1, 1]])
        """
        return cls.window(Lq, Lk, None, 0, q_offset, block_size=block_size)

    @classmethod
    def window(
        cls,
        Lq: int,
        Lk: int,
        left: int | None,
        right: int | None,
        q_offset: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask by which a query attends to the keys near it.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        left, right : int or None
            A query at position ``p`` attends to the keys ``p - left`` to ``p + right``, both
            included; None is no limit.
        q_offset : int, optional
            Position of the first query among the keys; by default ``Lk - Lq``: the last query is
            beside the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size, a limit or the position is not an int, or out of range.

        See Also
        --------
        attention : takes ``window=(left, right)`` too, which needs no mask.
        dilated : with gaps between the keys.
        global_and_window : with some tokens that see all.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.window(4, 4, 1, 0).to_dense().astype(int)
        array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [0, 1, 1, 0],
               [0, 0, 1, 1]])
        """
        lengths, block_size = _sizes(Lq, Lk, block_size)
        band = _Band(_side("left", left), _side("right", right), _offset(q_offset, lengths))
        blocks = band.blocks(lengths, block_size)
        return cls._evaluated(lengths, block_size, blocks, band.keep)

    @classmethod
    def _evaluated(
        cls,
        lengths: Size,
        block_size: Size,
        blocks: Array,
        keep: Callable[[Array, Array], Array],
    ) -> Self:
        """Return a mask of blocks that are EMPTY, FULL, or what `keep` says of their pairs.

        `keep` takes queries (n, block_queries, 1) and keys (n, 1, block_keys), all within the
        lengths.
        """
        is_open = blocks >= 0
        rows, columns = np.nonzero(is_open)
        at_a_time = max(1, _PAIRS_AT_A_TIME // (block_size[0] * block_size[1]))
        numbers = np.empty(len(rows), np.int32)
        kept, count = [np.zeros((0, block_size[0], bytes_of(block_size[1])), np.uint8)], 0
        for begin in range(0, len(rows), at_a_time):
            part = slice(begin, begin + at_a_time)
            q = rows[part, np.newaxis, np.newaxis] * block_size[0]
            k = columns[part, np.newaxis, np.newaxis] * block_size[1]
            q = np.minimum(q + np.arange(block_size[0])[:, np.newaxis], lengths[0] - 1)
            k = np.minimum(k + np.arange(block_size[1]), lengths[1] - 1)
            bits, place = distinct(pack(keep(q, k)))
            numbers[part] = place + count
            kept.append(bits)
            count += len(bits)
        blocks[is_open] = numbers
        return cls._normal((), lengths, block_size, blocks, np.concatenate(kept))


class _Band:
    """The keys from so many before a query to so many after it."""

    def __init__(self, left: int, right: int, q_offset: int) -> None:
        self._first, self._last = q_offset - left, q_offset + right

    def keep(self, q: Array, k: Array) -> Array:
        return np.asarray((k >= q + self._first) & (k <= q + self._last))

    def blocks(self, lengths: Size, block_size: Size) -> Array:
        """Return which blocks are EMPTY and FULL; the others are 0."""
        first_q, last_q, first_k, last_k = ends_of_blocks(lengths, block_size)
        full = first_k >= last_q + self._first
        full &= last_k <= first_q + self._last
        empty = last_k < first_q + self._first
        empty |= first_k > last_q + self._last
        blocks = np.zeros(full.shape, np.int32)
        blocks[full] = FULL
        blocks[empty] = EMPTY
        return blocks


def ends_of_blocks(lengths: Size, block_size: Size) -> tuple[Array, Array, Array, Array]:
    """Return the first and last queries, as a column, and keys of blocks."""
    ends = []
    for length, block, count in zip(lengths, block_size, grid_of(lengths, block_size), strict=True):
        first = np.arange(count) * block
        ends += [first, np.minimum(first + block, length) - 1]
    return ends[0][:, np.newaxis], ends[1][:, np.newaxis], ends[2], ends[3]


# ---- arguments ---------------------------------------------------------------------------------


def _sizes(Lq: object, Lk: object, block_size: object) -> tuple[Size, Size]:
    return (at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)), check_block_size(block_size)


def _side(name: str, limit: int | None) -> int:
    return MAX_POSITION if limit is None else min(at_least(name, limit, 0), MAX_POSITION)


def _offset(q_offset: int | None, lengths: Size) -> int:
    if q_offset is None:
        return lengths[1] - lengths[0]
    offset = integer("q_offset", q_offset)
    if abs(offset) > MAX_POSITION:
        refuse("q_offset", str(offset), f"{-MAX_POSITION} to {MAX_POSITION}")
    return offset
