"""Block masks by position and at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._block_mask_bits import EMPTY, FULL, no_bits
from ._block_mask_documents import BlockMaskDocuments
from ._block_mask_evaluated import ends_of_blocks, evaluated, extremes_of_blocks
from ._block_mask_operators import stacked
from ._block_mask_store import check_block_size, grid_of, ints
from ._checks import at_least, integer, refuse

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]

_MAX_POSITION = 2**60


class BlockMaskPatterns(BlockMaskDocuments):
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
        """Make a causal mask: no query attends to a key after it.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        q_offset : int, optional
            Position of the first query among the keys. Default: ``Lk - Lq``, which aligns the last
            query with the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size or the position is not an int, or is out of range.

        See Also
        --------
        attention : takes ``is_causal=True``, which needs no mask.
        window : also limit how far back queries attend.

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
        """Make a mask whose queries attend to the keys near them.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        left, right : int or None
            A query at position ``p`` attends to the keys ``p - left`` to ``p + right``, both
            included. None means no limit.
        q_offset : int, optional
            Position of the first query among the keys. Default: ``Lk - Lq``, which aligns the last
            query with the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size, a limit or the position is not an int, or is out of range.

        See Also
        --------
        attention : takes ``window=(left, right)``, which needs no mask.
        dilated : a window with gaps between the keys.
        global_and_window : a window and tokens that attend to everything.

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
        band = _Band(left, right, _offset(q_offset, lengths))
        blocks = band.blocks(lengths, block_size)
        arrays = evaluated(lengths, block_size, blocks, band.keep, lambda q, k: k - q)
        return cls._of(lengths, block_size, *arrays)

    @classmethod
    def dilated(
        cls,
        Lq: int,
        Lk: int,
        left: int | None,
        right: int | None,
        dilation: int,
        q_offset: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask whose queries attend to keys near them at regular distances.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        left, right : int or None
            A query at position ``p`` attends to the keys ``p + n * dilation`` for ``-left <= n <=
            right``, that is, up to `left` keys before and `right` keys after itself. None means no
            limit.
        dilation : int
            Distance between these keys; 1 is a plain window.
        q_offset : int, optional
            Position of the first query among the keys. Default: ``Lk - Lq``, which aligns the last
            query with the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size, a limit, the dilation or the position is not an int, or is out of range.

        See Also
        --------
        window : a window without gaps.

        Notes
        -----
        This is the dilated window of Beltagy et al., "Longformer: The Long-Document Transformer",
        2020. If blocks are larger than the dilation, all of them are mixed.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.dilated(5, 5, 1, 0, 2).to_dense().astype(int)
        array([[1, 0, 0, 0, 0],
               [0, 1, 0, 0, 0],
               [1, 0, 1, 0, 0],
               [0, 1, 0, 1, 0],
               [0, 0, 1, 0, 1]])
        """
        lengths, block_size = _sizes(Lq, Lk, block_size)
        step = min(at_least("dilation", dilation, 1), _MAX_POSITION)
        offset = _offset(q_offset, lengths)
        band = _Band(left, right, offset, step)
        blocks = band.blocks(lengths, block_size)
        if step > 1:
            blocks[blocks == FULL] = 0
        # Which blocks the limits do not cut. The last blocks are treated as whole blocks here.
        rows, columns = grid_of(lengths, block_size)
        inner = band.blocks((rows * block_size[0], columns * block_size[1]), block_size) == FULL

        def alike(q: Array, k: Array) -> Array:
            """Return a number per block. For blocks that are not cut it repeats with each step."""
            repeats = inner[q // block_size[0], k // block_size[1]]
            return np.asarray(np.where(repeats, sum(lengths) + (k - q) % step, k - q))

        def keep(q: Array, k: Array) -> Array:
            return np.asarray(band.keep(q, k) & ((k - q - offset) % step == 0))

        arrays = evaluated(lengths, block_size, blocks, keep, alike)
        return cls._of(lengths, block_size, *arrays)

    @classmethod
    def prefix(
        cls,
        Lq: int,
        Lk: int,
        prefix_length: ArrayLike,
        q_offset: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a causal mask with a prefix of keys that all queries attend to.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        prefix_length : int or array_like of int, shape (...)
            Number of keys in the prefix; an array has one number per batch item.
        q_offset : int, optional
            Position of the first query among the keys. Default: ``Lk - Lq``, which aligns the last
            query with the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk), or (..., 1, Lq, Lk) for an array of prefix lengths.

        Raises
        ------
        TypeError, ValueError
            If a size, a prefix length or the position is not an int, or is out of range.

        See Also
        --------
        causal : a causal mask without a prefix.

        Notes
        -----
        This is the prefix language model of Raffel et al., "Exploring the Limits of Transfer
        Learning with a Unified Text-to-Text Transformer", 2020.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.prefix(4, 4, 2).to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 0],
               [1, 1, 1, 1]])
        """
        lengths, block_size = _sizes(Lq, Lk, block_size)
        band = _Band(None, 0, _offset(q_offset, lengths))
        prefixes = ints("prefix_length", prefix_length)
        if prefixes.size == 0:
            refuse("prefix_length", f"shape {prefixes.shape}", "at least one number")
        outside = (prefixes < 0) | (prefixes > lengths[1])
        if outside.any():
            expected = f"0 to {lengths[1]}, the number of keys"
            refuse("prefix_length", str(prefixes[outside][0]), expected)
        masks = [cls._prefix(lengths, block_size, band, int(n)) for n in prefixes.ravel()]
        return stacked(masks, (*prefixes.shape, 1)) if prefixes.ndim else masks[0]

    @classmethod
    def _prefix(cls, lengths: Size, block_size: Size, band: _Band, prefix_length: int) -> Self:
        blocks = band.blocks(lengths, block_size)
        _, _, first_k, last_k = ends_of_blocks(lengths, block_size)
        np.copyto(blocks, 0, where=(blocks == EMPTY) & (first_k < prefix_length))
        blocks[:, last_k < prefix_length] = FULL

        def keep(q: Array, k: Array) -> Array:
            return band.keep(q, k) | (k < prefix_length)

        arrays = evaluated(lengths, block_size, blocks, keep)
        return cls._of(lengths, block_size, *arrays)

    @classmethod
    def global_and_window(
        cls,
        Lq: int,
        Lk: int,
        left: int | None,
        right: int | None,
        global_tokens: int | ArrayLike,
        q_offset: int | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask of a window and global tokens.

        A global token attends to all keys, and all queries attend to it.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        left, right : int or None
            A query at position ``p`` attends to the keys ``p - left`` to ``p + right``, both
            included. None means no limit.
        global_tokens : int or array_like of int, shape (n,)
            An int n makes the first n keys, and the queries at their positions, global. An array
            holds the positions of global keys and queries, in any order.
        q_offset : int, optional
            Position of the first query among the keys. Default: ``Lk - Lq``, which aligns the last
            query with the last key.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size, a limit or a position is not an int, or is out of range.

        See Also
        --------
        window : a window without global tokens.
        random_blocks : the third part of BigBird's pattern.

        Notes
        -----
        This is the pattern of Beltagy et al., "Longformer: The Long-Document Transformer", 2020.
        With ``& BlockMask.causal(Lq, Lk)`` it is a window with attention sinks.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.global_and_window(5, 5, 1, 1, 1).to_dense().astype(int)
        array([[1, 1, 1, 1, 1],
               [1, 1, 1, 0, 0],
               [1, 1, 1, 1, 0],
               [1, 0, 1, 1, 1],
               [1, 0, 0, 1, 1]])
        """
        lengths, block_size = _sizes(Lq, Lk, block_size)
        offset = _offset(q_offset, lengths)
        band = _Band(left, right, offset)
        of_keys = _global_keys(global_tokens, lengths[1])
        of_queries = np.zeros(lengths[0], np.bool_)
        first, last = max(offset, 0), min(offset + lengths[0], lengths[1])
        if first < last:
            of_queries[first - offset : last - offset] = of_keys[first:last]
        some_q, all_q = extremes_of_blocks(of_queries, block_size[0])[::-1]
        some_k, all_k = extremes_of_blocks(of_keys, block_size[1])[::-1]
        blocks = band.blocks(lengths, block_size)
        some = some_q[:, np.newaxis] | some_k
        np.copyto(blocks, 0, where=(blocks == EMPTY) & some)
        np.copyto(blocks, FULL, where=all_q[:, np.newaxis] | all_k)

        def keep(q: Array, k: Array) -> Array:
            return band.keep(q, k) | of_queries[q] | of_keys[k]

        arrays = evaluated(lengths, block_size, blocks, keep)
        return cls._of(lengths, block_size, *arrays)

    @classmethod
    def random_blocks(
        cls,
        Lq: int,
        Lk: int,
        count: int,
        rng: np.random.Generator | int,
        *,
        heads: int | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask whose blocks of queries attend to random blocks of keys.

        Parameters
        ----------
        Lq, Lk : int
            Number of queries and of keys.
        count : int
            Number of distinct blocks of keys for each block of queries.
        rng : numpy.random.Generator or int
            Generator of the random numbers, or a seed.
        heads : int, optional
            Number of query heads, each with different blocks. By default all heads have the same
            blocks.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk) or (heads, Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If a size or the count is not an int or is negative, if there are fewer than `count`
            blocks of keys, or if `rng` is neither a generator nor a seed.

        See Also
        --------
        global_and_window : the other two parts of BigBird's pattern.

        Notes
        -----
        ``random_blocks(...) | global_and_window(...)`` is the pattern of Zaheer et al., "Big Bird:
        Transformers for Longer Sequences", 2020.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.random_blocks(1024, 1024, 3, rng=0)
        >>> mask.density  # 3 of 16
        0.1875
        """
        lengths, block_size = _sizes(Lq, Lk, block_size)
        rows, columns = grid_of(lengths, block_size)
        number = at_least("count", count, 0)
        if number > columns:
            refuse("count", str(number), f"at most {columns}, the blocks of {lengths[1]} keys")
        leading = () if heads is None else (at_least("heads", heads, 0),)
        if not isinstance(rng, np.random.Generator):
            rng = np.random.default_rng(at_least("rng", rng, 0))
        blocks = np.full((*leading, rows, columns), EMPTY, np.int32)
        if number > 0:
            for of_head in blocks.reshape(-1, rows, columns):
                chosen = np.argpartition(rng.random((rows, columns)), number - 1, axis=-1)
                np.put_along_axis(of_head, chosen[:, :number], FULL, axis=-1)
        return cls._of((*leading, *lengths), block_size, blocks, no_bits(block_size))


class _Band:
    """The keys within given distances before and after a query, in steps."""

    def __init__(self, left: int | None, right: int | None, q_offset: int, step: int = 1) -> None:
        before, after = _side("left", left), _side("right", right)
        self._first = q_offset - min(before * step, _MAX_POSITION)
        self._last = q_offset + min(after * step, _MAX_POSITION)

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


# ---- arguments ---------------------------------------------------------------------------------


def _sizes(Lq: object, Lk: object, block_size: object) -> tuple[Size, Size]:
    return (at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)), check_block_size(block_size)


def _side(name: str, limit: int | None) -> int:
    return _MAX_POSITION if limit is None else min(at_least(name, limit, 0), _MAX_POSITION)


def _offset(q_offset: int | None, lengths: Size) -> int:
    if q_offset is None:
        return lengths[1] - lengths[0]
    offset = integer("q_offset", q_offset)
    if abs(offset) > _MAX_POSITION:
        refuse("q_offset", str(offset), f"{-_MAX_POSITION} to {_MAX_POSITION}")
    return offset


def _global_keys(global_tokens: int | ArrayLike, key_count: int) -> Array:
    """Return which keys are global."""
    positions = ints("global_tokens", global_tokens)
    if positions.ndim > 1:
        refuse("global_tokens", f"shape {positions.shape}", "an int, or positions (n,)")
    last = key_count if positions.ndim == 0 else key_count - 1
    outside = (positions < 0) | (positions > last)
    if outside.any():
        expected = f"0 to {last} for {key_count} keys"
        refuse("global_tokens", str(positions[outside][0]), expected)
    is_global = np.zeros(key_count, np.bool_)
    is_global[: int(positions) if positions.ndim == 0 else 0] = True
    is_global[positions if positions.ndim == 1 else []] = True
    return is_global
