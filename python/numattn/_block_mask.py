"""`BlockMask`: masks by blocks of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._block_mask_bits import EMPTY, FULL, Tiles, no_bits, pack, places_of_tiles
from ._block_mask_function import MaskFunction
from ._block_mask_operators import both, either, inverse
from ._block_mask_patterns import BlockMaskPatterns
from ._block_mask_store import check_block_size, check_bools, grid_of, ints
from ._checks import as_array, at_index, at_least, kind_of, refuse, refuse_kind
from ._public_methods import name_methods

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


@name_methods
class BlockMask(BlockMaskPatterns):
    """A mask of queries and keys, stored block by block.

    Empty blocks, in which no query attends to a key, cost no time. Full blocks, in which all pairs
    attend, cost as much as without a mask. Only mixed blocks keep a bit for each pair, and equal
    mixed blocks share their bits. Make masks with the class methods; they cannot be changed.

    Attributes
    ----------
    shape : tuple of int, (..., Lq, Lk)
        Shape of the same mask as a dense array. The axes before the last two are the axes of the
        batch and of the query heads; they broadcast like the axes of a dense mask.
    block_size : tuple of int, (queries, keys)
        Size of a block, at most 16,777,216 pairs. The last blocks may be partial.
    density : float
        Share of all pairs of a query and a key that attend; 0 for a mask without pairs.
    nbytes : int
        Bytes of memory that the mask takes: 4 for each block, and the bits of distinct mixed
        blocks.

    See Also
    --------
    attention : takes a BlockMask, or a dense mask as an array of bool.

    Notes
    -----
    Small blocks follow a mask more closely, and large ones take less memory. With blocks of 64 by
    64, the blocks take 4 MiB for 65,536 queries and keys, and 1 GiB for a million.

    A mask refers to row q of the queries and row k of the keys of a call, whatever `q_offset`,
    `kv_lengths` and `q_lengths` are. `is_causal` and `window` do depend on these.

    Masks can be compared with ``==``, hashed, copied and pickled. Two masks are equal if they have
    the same pairs, shape and block size.

    `from_mask_mod` takes the same function as PyTorch's FlexAttention (Dong et al., "Flex
    Attention: A Programming Model for Generating Optimized Attention Kernels", 2024), but calls it
    with NumPy arrays instead of scalars.

    Examples
    --------
    Sixteen packed texts of 64 tokens. Each token attends to itself and to the tokens before it in
    the same text:

    >>> import numpy as np
    >>> import numattn as na
    >>> text = np.repeat(np.arange(16), 64)
    >>> mask = na.BlockMask.from_mask_mod(
    ...     lambda batch, head, q, k: (k <= q) & (text[q] == text[k]), 1024, 1024
    ... )
    >>> mask.shape, mask.block_size, mask.nbytes
    ((1024, 1024), (64, 64), 1536)
    """

    __slots__ = ()

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[[Array, Array, Array, Array], Any],
        Lq: int,
        Lk: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask from a function that says which query attends to which key.

        Parameters
        ----------
        mask_mod : callable
            ``mask_mod(batch, head, q, k)`` takes four read-only arrays of int that broadcast to
            (batch items, heads, queries, keys). It returns bools of four axes that broadcast to
            the same shape: True = attend. ``q`` and ``k`` are row indices. With fewer queries than
            keys, ``k <= q + Lk - Lq`` is the mask that `causal` makes.
        Lq, Lk : int
            Number of queries and of keys.
        batch : int, optional
            Number of batch items. By default the mask does not depend on them, and `mask_mod` gets
            0 for `batch`.
        heads : int, optional
            Number of query heads. By default the mask does not depend on them, and `mask_mod` gets
            0 for `head`.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk), (heads, Lq, Lk), (batch, 1, Lq, Lk) or (batch, heads, Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `mask_mod` is not a function or returns anything but such bools, or if a size is not
            an int or is negative.

        See Also
        --------
        from_dense : make a mask from an array of bool.
        causal, window, documents : ready masks, made without evaluating each pair.

        Notes
        -----
        `mask_mod` is called for a few thousand keys at a time. The whole mask is never in memory.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_mask_mod(
        ...     lambda batch, head, q, k: (k <= q) & (q - k <= 2 * head), 4, 4, heads=2
        ... )
        >>> mask.to_dense().astype(int)
        array([[[1, 0, 0, 0],
                [0, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 1]],
        <BLANKLINE>
               [[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1]]])
        """
        if not callable(mask_mod):
            expected = "a function mask_mod(batch, head, q, k)"
            refuse_kind("mask_mod", kind_of(mask_mod), expected)
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        items = (
            1 if batch is None else at_least("batch", batch, 0),
            1 if heads is None else at_least("heads", heads, 0),
        )
        block_size = check_block_size(block_size)
        function = MaskFunction(mask_mod)
        tiles = Tiles(items, lengths, block_size)
        for leading, queries, keys in places_of_tiles(items, lengths, block_size):
            tiles.put(leading, queries, keys, function.bools((*leading, queries, keys)))
        blocks, bits = tiles.normal_form()
        kept = 2 if batch is not None else 1 if heads is not None else 0
        leading_shape = items[2 - kept :]
        blocks = blocks.reshape(*leading_shape, *blocks.shape[-2:])
        return cls._of((*leading_shape, *lengths), block_size, blocks, bits)

    @classmethod
    def from_dense(cls, mask: ArrayLike, block_size: tuple[int, int] = (64, 64)) -> Self:
        """Make a mask from an array of bool.

        Parameters
        ----------
        mask : array_like of bool, shape (..., Lq, Lk)
            True = attend, as in `attention`. The last two axes do not broadcast.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of the shape of `mask`.

        Raises
        ------
        TypeError, ValueError
            If the mask is not bool or has fewer than two axes, or if the block size is not a pair
            of positive ints.

        See Also
        --------
        to_dense : convert a mask to an array.
        from_mask_mod : make masks that are too large for an array.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> mask = na.BlockMask.from_dense(np.tri(100, dtype=bool))
        >>> bool((mask.to_dense() == np.tri(100, dtype=bool)).all())
        True
        """
        array = as_array("mask", mask)
        check_bools("mask", array)
        block_size = check_block_size(block_size)
        if array.ndim < 2:
            refuse("mask", f"shape {array.shape}", "(..., Lq, Lk)")
        *leading, query_count, key_count = array.shape
        lengths = query_count, key_count
        tiles = Tiles(tuple(leading), lengths, block_size)
        for items, queries, keys in places_of_tiles(tuple(leading), lengths, block_size):
            tiles.put(items, queries, keys, array[(*items, queries, keys)])
        return cls._of(array.shape, block_size, *tiles.normal_form())

    @classmethod
    def from_blocks(
        cls, keep: ArrayLike, Lq: int, Lk: int, block_size: tuple[int, int] = (64, 64)
    ) -> Self:
        """Make a mask from one bool per block.

        Parameters
        ----------
        keep : array_like of bool, shape (..., ceil(Lq / queries), ceil(Lk / keys))
            True for a full block, whose queries attend to all its keys; False for an empty one.
        Lq, Lk : int
            Number of queries and of keys.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (..., Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `keep` is not bool or has another shape, or if a size is not an int or is negative.

        See Also
        --------
        from_bsr : make a mask from the indices of the blocks in each row.
        random_blocks : draw blocks at random.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_blocks([[True, False], [True, True]], 3, 4, block_size=(2, 2))
        >>> mask.to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 1]])
        """
        array = as_array("keep", keep)
        check_bools("keep", array)
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        block_size = check_block_size(block_size)
        grid = grid_of(lengths, block_size)
        if array.shape[-2:] != grid:
            expected = f"(..., {grid[0]}, {grid[1]}), the blocks of {lengths[0]} queries and "
            expected += f"{lengths[1]} keys with block_size {block_size}"
            refuse("keep", f"shape {array.shape}", expected)
        blocks = np.where(array, np.int32(FULL), np.int32(EMPTY))
        return cls._of((*array.shape[:-2], *lengths), block_size, blocks, no_bits(block_size))

    @classmethod
    def from_bsr(
        cls,
        indptr: ArrayLike,
        indices: ArrayLike,
        Lq: int,
        Lk: int,
        block_size: tuple[int, int] = (64, 64),
        data: ArrayLike | None = None,
    ) -> Self:
        """Make a mask from the indices of the blocks in each row, in BSR format.

        Parameters
        ----------
        indptr : array_like of int, shape (ceil(Lq / queries) + 1,)
            Where the blocks of each row begin in `indices`, followed by the number of indices.
        indices : array_like of int, shape (n,)
            For each block the index of its block of keys, increasing within each row.
        Lq, Lk : int
            Number of queries and of keys.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.
        data : array_like of bool, shape (n, queries, keys), optional
            Which pairs of each block attend; elements beyond Lq and Lk are ignored. By default all
            pairs attend.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `indptr` or `indices` are not ints, have another shape, or are not sorted or out of
            range; if `data` is not bool or has another shape; or if a size is not an int or is
            negative.

        See Also
        --------
        from_blocks : make a mask from one bool per block.

        Notes
        -----
        This is the format of ``scipy.sparse.bsr_array``. Convert a matrix ``m`` of bool with
        ``from_bsr(m.indptr, m.indices, *m.shape, m.blocksize, m.data)``. If its indices are not
        sorted, call ``m.sum_duplicates()`` first. FlashInfer's names are `indptr`, `indices` and,
        for `data`, ``mask``.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_bsr([0, 1, 3], [0, 0, 1], 3, 4, block_size=(2, 2))
        >>> mask.to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 1]])
        """
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        block_size = check_block_size(block_size)
        rows, columns = grid_of(lengths, block_size)
        begins, places = ints("indptr", indptr), ints("indices", indices)
        if begins.shape != (rows + 1,):
            expected = f"({rows + 1},), one more than the rows of blocks of {lengths[0]} queries"
            refuse("indptr", f"shape {begins.shape}", f"{expected} with block_size {block_size}")
        if places.ndim != 1:
            refuse("indices", f"shape {places.shape}", "(n,), one index per block")
        if begins[0] != 0 or begins[-1] != len(places):
            seen = f"numbers from {begins[0]} to {begins[-1]}"
            expected = f"numbers from 0 to {len(places)}, the number of indices"
            refuse("indptr", seen, expected)
        counts = np.diff(begins)
        if (counts < 0).any():
            row = int(np.argmax(counts < 0))
            seen = f"{begins[row + 1]} after {begins[row]}{at_index(row + 1)}"
            refuse("indptr", seen, "numbers that do not decrease")
        outside = (places < 0) | (places >= columns)
        if outside.any():
            place = int(np.argmax(outside))
            expected = f"0 to {columns - 1}, the blocks of {lengths[1]} keys"
            refuse("indices", f"{places[place]}{at_index(place)}", expected)
        row_of = np.repeat(np.arange(rows), counts)
        wrong = (np.diff(places) <= 0) & (np.diff(row_of) == 0)
        if wrong.any():
            place = int(np.argmax(wrong))
            seen = f"{places[place + 1]} after {places[place]}{at_index(place + 1)}"
            advice = "call SciPy's `sum_duplicates()` first"
            refuse("indices", seen, "numbers that increase within each row", advice)
        blocks = np.full((rows, columns), EMPTY, np.int32)
        if data is None:
            blocks[row_of, places] = FULL
            return cls._of(lengths, block_size, blocks, no_bits(block_size))
        attends = as_array("data", data)
        check_bools("data", attends)
        if attends.shape != (len(places), *block_size):
            expected = f"{(len(places), *block_size)}, one block per index"
            refuse("data", f"shape {attends.shape}", expected)
        blocks[row_of, places] = np.arange(len(places))
        return cls._normal((), lengths, block_size, blocks, pack(attends))

    def __and__(self, other: Self) -> Self:
        """Return the mask of the pairs that attend in both masks; leading axes broadcast."""
        return both(self, other)

    def __or__(self, other: Self) -> Self:
        """Return the mask of the pairs that attend in either mask; leading axes broadcast."""
        return either(self, other)

    def __invert__(self) -> Self:
        """Return the mask of the pairs that do not attend."""
        return inverse(self)

    # NumPy's operators pass bool arrays to these methods, which refuse them with a hint.
    __rand__, __ror__ = __and__, __or__
